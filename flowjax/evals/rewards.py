"""The rewards of flowjax.rewards on stored images, and what follows from them: pairs, and how often one sample beats another."""

import jax
import numpy as np

from flowjax import rewards


def reward(section, images, labels) -> np.ndarray:
    """Float64 (N,) of a name, or {name: weight}, for uint8 images (N, H, W, C) and the labels (N,) they were asked for.

    Rounded to twelve digits, so that images of equal reward tie whatever the order of the sums.
    """
    with jax.enable_x64(True):
        total, _ = rewards.score(section, jax.numpy.asarray(images, float) / 127.5 - 1, labels, where="reward")
        return np.round(np.asarray(total, np.float64), 12)


def best_and_worst(x, scores):
    """(win, lose, kept): of x (P, K, ...) with scores (P, K) those of the highest and the lowest score in each row, without the rows
    in which all score the same; kept (P,) says which rows stayed."""
    kept = scores.max(1) > scores.min(1)
    rows = np.arange(len(x))
    return x[rows, scores.argmax(1)][kept], x[rows, scores.argmin(1)][kept], kept


def win_rate(a, b) -> float:
    """Share of pairs in which a's reward exceeds b's; ties count half."""
    return float(np.mean(0.5 * (1.0 + np.sign(np.asarray(a) - np.asarray(b)))))
