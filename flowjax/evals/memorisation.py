"""Are generated samples copies of training samples? No distance between distributions sees it: a copied train set scores best.

Held-out samples are the yardstick: by construction they are not copies, so their distances to the train set show how near one
comes without copying. Two views, since each alone can mislead:

- near: share of samples nearer to the train set than all but a share q of the held-out ones. Smooth or typical samples (guidance,
  averaging) raise it without copying anything.
- sided: share of samples whose nearest neighbour in train and held-out together is a train sample. Without copying that is
  n_train / (n_train + n_test), smooth or not (the exchangeability test of Meehan et al. 2020, 2004.05675, in its simplest form).

`flagged` needs both to exceed their expectation by three standard errors.
"""

import numpy as np

from flowjax.config import ConfigError

BLOCK = 1024


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distance (len(a),) of each row of a (N, d) to its nearest row of b (M, d)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    b_norms = (b * b).sum(1)
    out = []
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        # By the matrix product: pixels of a whole train set are too many for explicit differences. Rounding can leave -1e-13.
        squared = (rows * rows).sum(1) + (b_norms - 2 * rows @ b.T).min(1)
        out.append(np.sqrt(np.clip(squared, 0, None)))
    return np.concatenate(out)


def exceeds(share: float, expected: float, n: int, m: int) -> bool:
    """Is a share over n samples above its expectation, itself known from m samples, by more than three standard errors?"""
    return bool(share - expected > 3 * np.sqrt(expected * (1 - expected) * (1 / n + 1 / m)))


def memorisation(
    generated: np.ndarray, train: np.ndarray, test: np.ndarray, quantile: float = 0.05, limit: int = 2000, seed: int = 0
) -> dict:
    """Nearest-neighbour evidence on features (N, d) of three sets; `limit` bounds the generated and held-out rows (by `seed`)."""
    if not 0 < quantile < 1:
        raise ConfigError(f"memorisation.quantile = {quantile} must lie between 0 and 1")
    rng = np.random.default_rng(seed)
    generated, test = (x[rng.permutation(len(x))[:limit]] for x in (generated, test))
    to_train, to_test = nearest(generated, train), nearest(generated, test)
    held_out = nearest(test, train)
    near = float(np.mean(to_train < np.quantile(held_out, quantile)))
    sided = float(np.mean(to_train < to_test))
    sided_expected = len(train) / (len(train) + len(test))
    counts = len(generated), len(test)

    return {
        "near": near,
        "near_expected": quantile,
        "sided": sided,
        "sided_expected": sided_expected,
        "exact_copies": float(np.mean(to_train < 1e-6)),
        "median_distance": float(np.median(to_train)),
        "median_distance_held_out": float(np.median(held_out)),
        "flagged": exceeds(near, quantile, *counts) and exceeds(sided, sided_expected, *counts),
    }
