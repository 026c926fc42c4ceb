"""Randomness by position: published values, uniformity, bijections, and an order that never changes."""

import numpy as np
import pytest
import scipy.stats

from flowjax.data import counter, toys


def test_bits_are_splitmix64():
    # The widely published first outputs of SplitMix64 seeded with 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert counter.bits(1234567, np.arange(5)).tolist() == published


def test_make_key_depends_on_every_part_and_their_order():
    keys = [counter.make_key(*p) for p in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**63,), (1, 0, 0)]]
    assert len(set(keys)) == len(keys)
    assert counter.make_key(5, 2**64 + 3) == counter.make_key(5, 3)


def test_uniform_and_normal():
    i = np.arange(20_000)
    u = counter.uniform(3, i)
    assert u.min() >= 0 and u.max() < 1
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    pairs = counter.normal_pairs(3, i)
    assert pairs.shape == (20_000, 2)
    assert scipy.stats.kstest(pairs[:, 0], "norm").pvalue > 1e-3
    assert scipy.stats.kstest(pairs[:, 1], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(pairs[1:, 0], pairs[:-1, 1])[0, 1]) < 0.03
    np.testing.assert_array_equal(counter.normal_pairs(3, i[7:9]), pairs[7:9])
    # Resolution of 53 bits: the values are multiples of 2^-53, and not of 2^-52.
    scaled = u * 2.0**53
    assert np.all(scaled == np.floor(scaled)) and np.any(scaled % 2 == 1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1500, 4097])
def test_permute_is_a_bijection_of_any_part_of_the_range(n):
    whole = counter.permute(9, np.arange(n), n)
    assert sorted(whole) == list(range(n))
    np.testing.assert_array_equal(counter.permute(9, np.arange(n)[::-3], n), whole[::-3])


def test_permute_shuffles():
    n = 1000
    orders = np.stack([counter.permute(counter.make_key(k), np.arange(n), n) for k in range(200)])
    assert 0.5 < (orders == np.arange(n)).sum(1).mean() < 1.5  # a random permutation has one fixed point on average
    centred = orders - (n - 1) / 2
    assert abs(np.mean(centred[:, 1:] * centred[:, :-1])) / (n**2 / 12) < 0.02
    counts = np.bincount(orders[:, 0] // 100, minlength=10)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert len({tuple(counter.permute(counter.make_key(k), np.arange(3), 3)) for k in range(200)}) == 6


def test_the_order_never_changes():
    # Checkpoints hold a position only, so these values are part of the file format: a change would break exact resumption.
    assert counter.permute(counter.make_key(0, 1, 2), np.arange(8), 10).tolist() == [6, 7, 0, 1, 4, 8, 5, 3]
    assert int(counter.make_key(0, 1, 2)) == 17257806637652019996


def test_mix4_moments():
    out = toys.mix4(np.arange(20_000), 5)
    x, label = out["x"], out["label"]
    assert x.dtype == np.float32 and x.shape == (20_000, 2) and label.dtype == np.int32
    for k, centre in enumerate([(-1, -1), (-1, 1), (1, -1), (1, 1)]):
        mode = x[label == k]
        assert len(mode) == pytest.approx(5000, abs=250)
        np.testing.assert_allclose(mode.mean(0), centre, atol=0.02)
        np.testing.assert_allclose(np.cov(mode.T), 0.0625 * np.eye(2), atol=0.006)


def test_moons_agree_with_sklearn():
    from sklearn.datasets import make_moons
    from sklearn.neighbors import NearestNeighbors

    out = toys.moons(np.arange(4000), 5)
    curve, side = make_moons(4000, noise=None)
    for label in (0, 1):
        x, arc = out["x"][out["label"] == label], curve[side == label]
        assert len(x) == pytest.approx(2000, abs=150)
        np.testing.assert_allclose(x.mean(0), arc.mean(0), atol=0.06)
        distance, nearest = NearestNeighbors(n_neighbors=1).fit(arc).kneighbors(x)
        # Noise of std 0.05 leaves the curve by |N(0, 0.05^2)| where it is nearly straight.
        assert np.sqrt(np.mean(distance**2)) == pytest.approx(0.05, abs=0.004)
        assert np.percentile(nearest, 95) > 1850 and np.percentile(nearest, 5) < 150  # all along the arc


def test_checkerboard_fills_the_dark_cells_evenly():
    out = toys.checkerboard(np.arange(16_000), 5)
    x = out["x"]
    assert "label" not in out and x.dtype == np.float32
    cells = np.floor(x).astype(int)
    assert np.all(cells.sum(1) % 2 == 0)
    found, counts = np.unique(cells, axis=0, return_counts=True)
    assert sorted(map(tuple, found)) == [(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    for axis in (0, 1):
        assert scipy.stats.kstest(x[:, axis] - cells[:, axis], "uniform").pvalue > 1e-3
    assert abs(np.corrcoef((x - cells).T)[0, 1]) < 0.05
