"""Frechet distance between feature sets, from statistics that stream, merge exactly and gather across processes.

    FD = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^{1/2})          Heusel et al. 2017 (1706.08500), eq. 6; it is a SQUARED distance

Everything is numpy float64 on the host: the trace term is a small difference of large numbers. Covariances divide by n - 1.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flowjax.config import ConfigError
from flowjax.evals import processes


class Statistics(NamedTuple):
    """Sufficient statistics of a feature set: count, mean (d,), and m2 (d, d) = sum of outer(x - mean, x - mean)."""

    n: int
    mean: np.ndarray
    m2: np.ndarray

    @property
    def cov(self) -> np.ndarray:
        """Sample covariance (d, d), division by n - 1 as in np.cov."""
        if self.n < 2:
            raise ConfigError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.m2 / (self.n - 1)


def statistics(features: np.ndarray, mask: np.ndarray | None = None) -> Statistics:
    """Statistics of features (N, d); rows where mask (N,) is False are padding and are dropped, whatever they hold."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise ConfigError(f"features must be (N, d), got shape {features.shape}")
    if mask is not None:
        mask = np.asarray(mask).astype(bool)
        if mask.shape != features.shape[:1]:
            raise ConfigError(f"mask of shape {mask.shape} does not match features of shape {features.shape}")
        features = features[mask]
    if not np.isfinite(features).all():
        raise ConfigError("features hold NaN or infinite values")
    n, d = features.shape
    if n == 0:
        return Statistics(0, np.zeros(d), np.zeros((d, d)))
    mean = features.mean(0)
    centred = features - mean
    return Statistics(n, mean, centred.T @ centred)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the union (Chan, Golub, LeVeque 1983); sum(xx^T) - n mu mu^T would cancel, this does not."""
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"statistics of {len(a.mean)} and {len(b.mean)} features cannot be merged")
    if a.n == 0 or b.n == 0:
        return b if a.n == 0 else a
    n, delta = a.n + b.n, b.mean - a.mean
    return Statistics(n, a.mean + delta * (b.n / n), a.m2 + b.m2 + np.outer(delta, delta) * (a.n * b.n / n))


def stream(batches: Iterable[np.ndarray]) -> Statistics:
    """Statistics of the concatenation of feature batches, each (B_i, d), holding one batch at a time."""
    return functools.reduce(merge, map(statistics, batches))


def gather(local: Statistics) -> Statistics:
    """Statistics of the union over all processes; every process calls it and gets the same answer."""
    d = len(local.mean)
    rows = processes.gather(np.concatenate([[np.float64(local.n)], local.mean, local.m2.ravel()])[None])
    return functools.reduce(merge, (Statistics(int(r[0]), r[1 : d + 1], r[d + 1 :].reshape(d, d)) for r in rows))


def distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance of the two Gaussian fits.

    tr (S1 S2)^{1/2} is the sum of the square roots of the eigenvalues of the SYMMETRIC R S2 R with R = S1^{1/2}: unlike a matrix
    square root of the non-symmetric product, it stays real and accurate where n <= d makes the covariances singular. Values
    below zero by rounding are returned as they are.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"cannot compare {len(a.mean)} features with {len(b.mean)}")
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.cov @ root)
    trace = np.trace(a.cov) + np.trace(b.cov) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + trace)


def expected_bias(cov: np.ndarray, n1: int, n2: int) -> float:
    """E[FD] between n1 and n2 samples of the SAME Gaussian N(mu, cov): what sampling alone produces, to leading order in 1/n.

    (1/n1 + 1/n2) (tr S + 1/2 sum_ij l_i l_j (1 + [i=j]) / (l_i + l_j)), l the eigenvalues of S; for S = I_d the bracket is
    d + d(d+1)/4. Second-order perturbation of the trace term under Wishart noise; needs n1, n2 well above d.
    """
    values = np.linalg.eigvalsh(cov)
    values = values[values > values.max() * 1e-12]  # directions without variance contribute nothing, but 0/0 here
    pairs = np.outer(values, values) / np.add.outer(values, values)
    return float((1 / n1 + 1 / n2) * (values.sum() + 0.5 * (pairs.sum() + np.trace(pairs))))
