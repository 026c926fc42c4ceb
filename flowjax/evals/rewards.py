"""Rewards that can be computed from an image (and the class it was asked for): higher is preferred.

reward(images uint8 (N, H, W, C), labels (N,)) -> float64 (N,). Programmatic, so that what a preference method achieves can be
checked on fresh samples.
"""

import numpy as np

from flowjax.config import lookup


def ink(images, labels) -> np.ndarray:
    """Stroke mass: mean brightness in [0, 1]."""
    del labels
    return images.astype(np.float64).mean(axis=(1, 2, 3)) / 255.0


def upper(images, labels) -> np.ndarray:
    """Share of the brightness in the upper half; 0.5 for an empty image."""
    del labels
    rows = images.astype(np.float64).sum(axis=(2, 3))
    total = rows.sum(axis=1)
    return np.where(total > 0, rows[:, : rows.shape[1] // 2].sum(axis=1) / np.maximum(total, 1.0), 0.5)


REWARDS = {"ink": ink, "upper": upper}


def reward(name: str, images, labels) -> np.ndarray:
    """REWARDS[name](images, labels)."""
    return lookup(REWARDS, name, "reward")(images, labels)


def best_and_worst(x, scores):
    """(win, lose, kept): of x (P, K, ...) with scores (P, K) those of the highest and the lowest score in each row, without the rows
    in which all score the same; kept (P,) says which rows stayed."""
    kept = scores.max(1) > scores.min(1)
    rows = np.arange(len(x))
    return x[rows, scores.argmax(1)][kept], x[rows, scores.argmin(1)][kept], kept


def win_rate(a, b) -> float:
    """Share of pairs in which a's reward exceeds b's; ties count half."""
    return float(np.mean(0.5 * (1.0 + np.sign(np.asarray(a) - np.asarray(b)))))
