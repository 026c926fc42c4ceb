"""The estimator of the Kernel Inception Distance on any features: unbiased MMD^2, cubic kernel (Binkowski et al., 1801.01401)."""

import numpy as np

from flowjax.config import ConfigError


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 of x (m, d) and y (n, d) under k(a, b) = (a.b / d + 1)^3.

    Its mean is 0 for equal distributions, so it can be negative.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    (m, d), n = x.shape, len(y)
    if min(m, n) < 2:
        raise ConfigError(f"MMD needs at least 2 samples on each side, got {m} and {n}")
    k_xx, k_yy, k_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within_x = (k_xx.sum() - np.trace(k_xx)) / (m * (m - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (n * (n - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(mean, standard deviation) of MMD^2 over random subsets, drawn without replacement inside a subset.

    The deviation describes one subset; it is not the standard error of the full-set value. Not comparable across features: their
    scale enters cubed. Negative values are kept.
    """
    if subset_size > min(len(x), len(y)):
        raise ConfigError(f"kid.subset_size = {subset_size} exceeds the {min(len(x), len(y))} samples at hand")
    rng = np.random.default_rng(seed)
    values = [
        mmd2(x[rng.choice(len(x), subset_size, replace=False)], y[rng.choice(len(y), subset_size, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))
