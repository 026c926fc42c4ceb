"""Precision and recall (Kynkaanniemi et al. 2019, 1904.06991); density and coverage (Naeem et al. 2020, 2002.09797).

Swapping the two sets swaps precision with recall without any sign of it, hence keyword-only arguments. All four depend on k and
on the sample counts: compare equal counts only.
"""

from collections.abc import Iterator

import numpy as np

from flowjax.config import ConfigError

BLOCK = 1024  # rows per block of the distance matrix: bounds the memory at BLOCK * N * 8 bytes


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances (<= BLOCK, len(b)), block of rows by block; by differences, so that ties and zeros come out exact."""
    from scipy.spatial.distance import cdist

    for start in range(0, len(a), BLOCK):
        yield cdist(a[start : start + BLOCK], b, "sqeuclidean")


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance (N,) of every row to its k-th neighbour in x: index k of the sorted row, since 0 is the row itself."""
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _blocks(x, x)])


def _check(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ConfigError(f"features must be (N, d) with one d, got real {real.shape} and generated {generated.shape}")
    if not 1 <= k < min(len(real), len(generated)):
        raise ConfigError(f"k = {k} must be at least 1 and below the sample counts {len(real)} and {len(generated)}")
    return real, generated


def precision_recall(*, real: np.ndarray, generated: np.ndarray, k: int = 3) -> dict[str, float]:
    """Share of generated samples inside some real ball (precision) and of real samples inside some generated ball (recall).

    A ball reaches to its centre's k-th neighbour within its own set and includes its boundary (1904.06991, eq. 1).
    """
    real, generated = _check(real, generated, k)
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    precision = np.concatenate([(block <= real_radii).any(1) for block in _blocks(generated, real)])
    recall = np.concatenate([(block <= generated_radii).any(1) for block in _blocks(real, generated)])
    return {"precision": float(precision.mean()), "recall": float(recall.mean())}


def density_coverage(*, real: np.ndarray, generated: np.ndarray, k: int = 5) -> dict[str, float]:
    """Mean number of real balls around a generated sample over k (may exceed 1), and share of real balls that hold one.

    Balls exclude their boundary (2002.09797, eqs. 3 and 4).
    """
    real, generated = _check(real, generated, k)
    radii = _radii(real, k)
    inside, covered = 0, np.zeros(len(real), bool)
    for block in _blocks(generated, real):
        hits = block < radii
        inside += hits.sum()
        covered |= hits.any(0)
    return {"density": float(inside / (k * len(generated))), "coverage": float(covered.mean())}


def expected_coverage(n_real: int, n_generated: int, k: int = 5) -> float:
    """E[coverage] of equal distributions, 1 - prod_{j=1..k} (N-j)/(N+M-j): about 1 - 2^-k at N = M; E[density] is 1."""
    j = np.arange(1, k + 1)
    return float(1 - np.prod((n_real - j) / (n_real + n_generated - j)))
