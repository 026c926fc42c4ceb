"""KID, precision and recall, density and coverage, memorisation: hand-worked sets, expectations, argument order."""

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.evals import memorisation, prdc
from flowjax.evals.kid import kid, mmd2
from flowjax.evals.memorisation import exceeds
from flowjax.evals.prdc import density_coverage, expected_coverage, precision_recall


def column(*values):
    return np.array(values, float)[:, None]


# --- KID


def test_mmd_of_two_unit_vectors_with_themselves():
    # k(e_i, e_i) = (1/2 + 1)^3 = 3.375 and k(e_1, e_2) = 1: 1 + 1 - 2 (3.375 + 1)/2
    assert mmd2(np.eye(2), np.eye(2)) == pytest.approx(-2.375, abs=1e-12)


def test_mmd_with_unequal_counts_and_sets():
    # k = (xy + 1)^3: x pair 27; y pairs 1, 1, 0; cross 1, 8, 0 for x = 1 and 1, 27, -1 for x = 2
    assert mmd2(column(1, 2), column(0, 1, -1)) == pytest.approx(27 + 2 / 3 - 2 * 36 / 6, abs=1e-12)


def test_mmd_is_unbiased_and_keeps_negative_values():
    rng = np.random.default_rng(0)
    values = [mmd2(rng.normal(size=(30, 4)), rng.normal(size=(20, 4))) for _ in range(1500)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0


def test_mmd_sees_a_change_of_scale_and_is_not_shift_invariant():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 4)), 1.5 * rng.normal(size=(300, 4))
    assert mmd2(x, y) > 0.05
    assert abs(mmd2(x + 2, y + 2) - mmd2(x, y)) > 0.1 * mmd2(x, y)


def test_kid_over_whole_sets_is_the_mmd():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(25, 3)), rng.normal(size=(25, 3)) + 1
    mean, spread = kid(x, y, subsets=3, subset_size=25)
    assert mean == pytest.approx(mmd2(x, y), rel=1e-10)
    assert spread < 1e-10


def test_kid_subsets_are_seeded_and_bounded():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(60, 3))
    assert kid(x, y, 5, 20, seed=1) == kid(x, y, 5, 20, seed=1) != kid(x, y, 5, 20, seed=2)
    assert kid(x, y, 5, 20)[1] > 0
    with pytest.raises(ConfigError, match="subset_size"):
        kid(x, y, 5, 51)
    with pytest.raises(ConfigError, match="2 samples"):
        mmd2(x[:1], y)


@pytest.mark.oracle
def test_torchmetrics_mmd_agrees():
    torch = pytest.importorskip("torch")
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(20, 7)), rng.normal(size=(20, 7)) + 0.3
    expected = float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y)))
    assert mmd2(x, y) == pytest.approx(expected, rel=1e-10)


# --- precision, recall, density, coverage


def test_balls_worked_by_hand():
    # Real 0, 1, 3 with k = 1 have radii 1, 1, 2. Generated -1 and 5 lie exactly on a boundary, 100 far outside.
    real, generated = column(0, 1, 3), column(-1, 5, 100)
    assert precision_recall(real=real, generated=generated, k=1) == {"precision": pytest.approx(2 / 3), "recall": 1.0}
    assert precision_recall(real=generated, generated=real, k=1) == {"precision": 1.0, "recall": pytest.approx(2 / 3)}
    assert density_coverage(real=real, generated=generated, k=1) == {"density": 0.0, "coverage": 0.0}
    # 0.5 lies in two balls, 2 in the third; k = 2: radii 3, 2, 3, and 0.5 lies in all of them, 2 too
    inner = column(0.5, 2, 50)
    assert density_coverage(real=real, generated=inner, k=1) == {"density": pytest.approx(3 / 3), "coverage": 1.0}
    assert density_coverage(real=real, generated=inner, k=2) == {"density": pytest.approx(6 / (2 * 3)), "coverage": 1.0}


def test_argument_order():
    """Generated samples of one of two real clusters are all real-looking, but cover half: precision 1, recall 1/2."""
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 50])
    generated = 0.5 * rng.normal(size=(200, 2))
    scores = precision_recall(real=real, generated=generated)
    assert scores["precision"] > 0.95 and 0.2 < scores["recall"] <= 0.5
    swapped = precision_recall(real=generated, generated=real)
    assert swapped == {"precision": scores["recall"], "recall": scores["precision"]}
    assert density_coverage(real=real, generated=generated)["coverage"] <= 0.5
    # The papers' neighbour counts are what is used unasked.
    assert scores == precision_recall(real=real, generated=generated, k=3)
    assert scores != precision_recall(real=real, generated=generated, k=4)
    assert density_coverage(real=real, generated=generated) == density_coverage(real=real, generated=generated, k=5)
    with pytest.raises(TypeError):
        precision_recall(real, generated)


def test_a_set_covers_itself():
    x = np.random.default_rng(1).normal(size=(40, 3))
    assert precision_recall(real=x, generated=x) == {"precision": 1.0, "recall": 1.0}
    # Each ball holds its centre and k - 1 neighbours strictly inside.
    assert density_coverage(real=x, generated=x, k=5) == {"density": 1.0, "coverage": 1.0}


@pytest.mark.parametrize("n, m, k", [(60, 60, 5), (40, 90, 3)])
def test_expectations_for_equal_distributions(n, m, k):
    rng = np.random.default_rng(2)
    scores = [density_coverage(real=rng.normal(size=(n, 2)), generated=rng.normal(size=(m, 2)), k=k) for _ in range(400)]
    for name, expected in (("density", 1.0), ("coverage", expected_coverage(n, m, k))):
        values = [s[name] for s in scores]
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / 20


def test_expected_coverage_of_large_sets():
    assert expected_coverage(500, 500) == pytest.approx(0.969, abs=5e-4)
    assert expected_coverage(10**6, 10**6, 3) == pytest.approx(1 - 2**-3, abs=1e-5)


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(3)
    sets = {"real": rng.normal(size=(50, 2)), "generated": rng.normal(size=(45, 2)) + 0.5}
    whole = precision_recall(**sets), density_coverage(**sets)
    near = memorisation.nearest(sets["real"], sets["generated"])
    monkeypatch.setattr(prdc, "BLOCK", 7)
    monkeypatch.setattr(memorisation, "BLOCK", 7)
    assert (precision_recall(**sets), density_coverage(**sets)) == whole
    np.testing.assert_allclose(memorisation.nearest(sets["real"], sets["generated"]), near, rtol=1e-12)


def test_bad_sets_are_refused():
    x = np.zeros((6, 2))
    for k in (0, 6):
        with pytest.raises(ConfigError, match="k = "):
            precision_recall(real=x, generated=np.zeros((9, 2)), k=k)
    with pytest.raises(ConfigError, match="one d"):
        density_coverage(real=x, generated=np.zeros((6, 3)))


# --- memorisation


def test_nearest_distances():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(9, 3)), rng.normal(size=(7, 3))
    brute = [min(np.linalg.norm(p - q) for q in b) for p in a]
    np.testing.assert_allclose(memorisation.nearest(a, b), brute, rtol=1e-10)


def test_memorisation_worked_by_hand():
    report = memorisation.memorisation(column(1, 4, 10), column(0, 10, 20, 30), column(5.5, 48), quantile=0.5)
    # To train 1, 4, 0; to held-out 4.5, 1.5, 4.5; held-out to train 4.5, 18, whose median is 11.25.
    assert report == {
        "near": 1.0,
        "near_expected": 0.5,
        "sided": pytest.approx(2 / 3),
        "sided_expected": pytest.approx(4 / 6),
        "exact_copies": pytest.approx(1 / 3),
        "median_distance": 1.0,
        "median_distance_held_out": 11.25,
        "flagged": False,
    }


def test_memorisation_ties_count_for_neither_side():
    # 5 is as far from train as from held-out, and exactly as near to train as the held-out quantile.
    report = memorisation.memorisation(column(5), column(0, 100), column(10, 5), quantile=0.5)
    assert report["sided"] == 0.0 and report["exact_copies"] == 0.0
    tie = memorisation.memorisation(column(5), column(0, 100), column(10), quantile=0.5)
    assert tie["sided"] == 0.0 and tie["near"] == 1.0
    assert memorisation.memorisation(column(10), column(0, 100), column(10), quantile=0.5)["near"] == 0.0


def test_three_standard_errors():
    error = np.sqrt(0.2 * 0.8 * (1 / 50 + 1 / 200))
    assert exceeds(0.2 + 3.05 * error, 0.2, 50, 200)
    assert not exceeds(0.2 + 2.95 * error, 0.2, 50, 200)


def test_copies_are_flagged_and_fresh_or_merely_typical_samples_are_not():
    rng = np.random.default_rng(5)
    train, test, fresh = (rng.normal(size=(n, 4)) for n in (800, 300, 300))
    copies = train[rng.permutation(800)[:300]]
    assert memorisation.memorisation(copies, train, test)["flagged"]
    assert memorisation.memorisation(copies + 0.02 * rng.normal(size=copies.shape), train, test)["flagged"]
    half = np.where(np.arange(300)[:, None] < 150, copies, fresh)
    assert memorisation.memorisation(half, train, test)["flagged"]
    assert not memorisation.memorisation(fresh, train, test)["flagged"]
    # Shrunk towards the mean, samples come near to train images, and as near to held-out ones: typical, not copied.
    typical = memorisation.memorisation(0.5 * fresh, train, test)
    assert typical["near"] > 0.15 and not typical["flagged"]
    with pytest.raises(ConfigError, match="quantile"):
        memorisation.memorisation(fresh, train, test, quantile=1.0)
