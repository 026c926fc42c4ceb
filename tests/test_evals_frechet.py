"""Frechet statistics and distance: closed forms, merging, singular covariances, finite-sample bias, two real processes."""

import functools
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.evals import frechet
from flowjax.evals.frechet import Statistics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def gaussian(mean, cov, n=101):
    """Statistics whose mean and covariance are exactly the given ones."""
    return Statistics(n, np.asarray(mean, float), np.asarray(cov, float) * (n - 1))


def draw(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d) * 3


def rotation(d, seed=9):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def test_diagonal_covariances():
    a, b = gaussian([0, 0], np.diag([1.0, 4])), gaussian([0, 0], np.diag([9.0, 1]))
    assert frechet.distance(a, b) == pytest.approx(5, abs=1e-12)  # (1-3)^2 + (2-1)^2


def test_means_add_their_squared_distance():
    assert frechet.distance(gaussian([1, -2], np.eye(2)), gaussian([4, 2], np.eye(2))) == pytest.approx(25, abs=1e-12)


def test_one_dimension():
    assert frechet.distance(gaussian([1], [[4.0]]), gaussian([3], [[25.0]])) == pytest.approx(4 + 9, abs=1e-12)


def test_scaled_covariance():
    cov = np.cov(draw(50, 6).T)
    value = frechet.distance(gaussian(np.zeros(6), cov), gaussian(np.zeros(6), 2.5**2 * cov))
    assert value == pytest.approx((1 - 2.5) ** 2 * np.trace(cov), rel=1e-10)


def test_covariances_that_do_not_commute():
    # Wasserstein-2 between these Gaussians, worked out independently of this code.
    a = gaussian([1, 0], [[2, 0.5], [0.5, 1]])
    b = gaussian([0, 2], [[1, -0.2], [-0.2, 3]])
    assert frechet.distance(a, b) == pytest.approx(5.8838173, abs=5e-8)
    assert frechet.distance(b, a) == pytest.approx(5.8838173, abs=5e-8)


def test_two_samples_have_a_covariance():
    np.testing.assert_allclose(frechet.statistics(np.array([[0.0], [2.0]])).cov, [[2.0]])


def test_a_set_is_at_distance_zero_from_itself():
    stats = frechet.statistics(draw(200, 16))
    assert abs(frechet.distance(stats, stats)) < 1e-6 * np.trace(stats.cov)


def test_common_rotation_and_shift_change_nothing_and_scale_enters_squared():
    x, y = draw(60, 8, 1), draw(70, 8, 2)
    base = frechet.distance(frechet.statistics(x), frechet.statistics(y))
    q = rotation(8)
    moved = frechet.distance(frechet.statistics(x @ q + 5), frechet.statistics(y @ q + 5))
    scaled = frechet.distance(frechet.statistics(3 * x), frechet.statistics(3 * y))
    assert moved == pytest.approx(base, rel=1e-9)
    assert scaled == pytest.approx(9 * base, rel=1e-9)


@pytest.mark.parametrize("n", [5, 32, 33])
def test_fewer_samples_than_features(n):
    """tr (S1 S2)^{1/2} is the nuclear norm of A B^T / sqrt((n1-1)(n2-1)) for centred A, B, also where both are singular."""
    x, y = draw(n, 32, 1).astype(np.float32), draw(n + 3, 32, 2).astype(np.float32)
    a, b = (z.astype(float) - z.astype(float).mean(0) for z in (x, y))
    cross = np.linalg.norm(a @ b.T, "nuc") / np.sqrt((n - 1) * (n + 2))
    shift = x.astype(float).mean(0) - y.astype(float).mean(0)
    expected = shift @ shift + (a**2).sum() / (n - 1) + (b**2).sum() / (n + 2) - 2 * cross
    assert frechet.distance(frechet.statistics(x), frechet.statistics(y)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("cuts", [[1], [50], [99], [10, 11, 60], [0, 30], list(range(1, 100))])
def test_merge_of_any_split_is_the_whole(cuts):
    x = draw(100, 5) + 1e4  # a large mean: sum(xx^T) - n mu mu^T would lose its digits
    stats = frechet.stream(np.split(x, cuts))
    assert stats.n == 100
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.cov, np.cov(x.T), rtol=1e-10, atol=1e-10 * np.trace(np.cov(x.T)))
    swapped = functools.reduce(frechet.merge, map(frechet.statistics, np.split(x, cuts)[::-1]))
    np.testing.assert_allclose(swapped.cov, stats.cov, rtol=1e-9)


def test_padding_rows_are_dropped_whatever_they_hold():
    x = draw(7, 3)
    padded = np.concatenate([x, np.full((3, 3), np.nan)])
    mask = np.arange(10) < 7
    for got, want in zip(frechet.statistics(padded, mask), frechet.statistics(x)):
        np.testing.assert_array_equal(got, want)


def test_expected_bias_of_equal_variances():
    d = 16
    assert frechet.expected_bias(4 * np.eye(d), 200, 300) == pytest.approx((1 / 200 + 1 / 300) * 4 * (d + d * (d + 1) / 4))


def test_expected_bias_ignores_directions_without_variance():
    assert frechet.expected_bias(np.diag([1.0, 2, 0]), 50, 70) == pytest.approx(frechet.expected_bias(np.diag([1.0, 2]), 50, 70))


def test_expected_bias_is_what_sampling_produces():
    scale, n1, n2 = np.array([0.3, 1, 1, 2, 4]), 300, 150
    rng = np.random.default_rng(0)
    values = [
        frechet.distance(*(frechet.statistics(rng.normal(size=(n, 5)) * scale) for n in (n1, n2))) for _ in range(1500)
    ]
    spread = np.std(values) / np.sqrt(len(values))
    expected = frechet.expected_bias(np.diag(scale**2), n1, n2)
    assert abs(np.mean(values) - expected) < 4 * spread + 0.01 * expected
    assert spread < 0.02 * expected


def test_bad_features_are_refused():
    with pytest.raises(ConfigError, match="shape"):
        frechet.statistics(np.zeros((2, 3, 4)))
    with pytest.raises(ConfigError, match="NaN"):
        frechet.statistics(np.array([[0.0], [np.nan]]))
    with pytest.raises(ConfigError, match="mask"):
        frechet.statistics(np.zeros((4, 2)), np.ones(3))
    with pytest.raises(ConfigError, match="2 samples"):
        frechet.statistics(np.zeros((1, 2))).cov
    with pytest.raises(ConfigError, match="merged"):
        frechet.merge(frechet.statistics(np.zeros((2, 2))), frechet.statistics(np.zeros((2, 3))))
    with pytest.raises(ConfigError, match="compare"):
        frechet.distance(frechet.statistics(np.zeros((2, 2))), frechet.statistics(np.zeros((2, 3))))


def test_gather_on_one_process_is_the_local_set():
    stats = frechet.statistics(draw(9, 2))
    assert frechet.gather(stats).n == 9
    np.testing.assert_array_equal(frechet.gather(stats).mean, stats.mean)
    np.testing.assert_array_equal(frechet.gather(stats).m2, stats.m2)


@pytest.mark.slow
def test_gather_over_two_processes(tmp_path):
    """Unequal shares, one float64 answer on both: a float32 transport would miss 1e-12 by far."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    script = textwrap.dedent(f"""
        import sys, jax, numpy as np
        rank = int(sys.argv[1])
        jax.distributed.initialize("localhost:{port}", 2, rank)
        from flowjax.evals import frechet, processes
        x = np.random.default_rng(0).normal(size=(50, 4)) + 1e3
        s = frechet.gather(frechet.statistics(x[:13] if rank == 0 else x[13:]))
        assert s.n == 50, s.n
        np.testing.assert_allclose(s.mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(s.cov, np.cov(x.T), rtol=1e-10, atol=1e-12)
        shares = [x[:3], x[3:8]]
        np.testing.assert_array_equal(processes.gather(shares[rank]), x[:8])
        np.testing.assert_array_equal(processes.gather(shares[rank][:, 0]), x[:8, 0])
        np.testing.assert_array_equal(processes.gather(x[:0] if rank else x[:2]), x[:2])
        np.testing.assert_array_equal(processes.agree(x[rank]), x[0])
        assert [processes.share(7)] == [[slice(0, 3)], [slice(3, 7)]][rank]
    """)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    workers = [subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        for worker in workers:
            _, err = worker.communicate(timeout=120)
            assert worker.returncode == 0, err
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.oracle
@pytest.mark.parametrize("n", [40, 8])
def test_torchmetrics_agrees(n):
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = draw(n, 12, 3), draw(n + 5, 12, 4)
    a, b = ((torch.from_numpy(z.mean(0)), torch.from_numpy(np.cov(z.T))) for z in (x, y))
    expected = float(fid._compute_fid(*a, *b))
    assert frechet.distance(frechet.statistics(x), frechet.statistics(y)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.oracle
def test_torchmetrics_class_on_custom_features_agrees():
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1).double()

    rng = np.random.default_rng(5)
    real, generated = rng.integers(0, 256, (30, 3, 2, 2), np.uint8), rng.integers(0, 200, (40, 3, 2, 2), np.uint8)
    metric = fid.FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    ours = frechet.distance(*(frechet.statistics(z.reshape(len(z), -1)) for z in (real, generated)))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)
