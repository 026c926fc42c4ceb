"""Expectations of losses without sampling error: deterministic batches whose weighted mean is the expectation."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(n: int):
    """Gauss-Hermite nodes and weights for N(0, 1): exact for polynomials up to degree 2 n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / weights.sum()


def product(*rules):
    """The product rule of one-dimensional (nodes, weights): nodes (N, len(rules)), weights (N,)."""
    nodes = np.stack([g.ravel() for g in np.meshgrid(*(r[0] for r in rules), indexing="ij")], axis=-1)
    weights = np.prod([g.ravel() for g in np.meshgrid(*(r[1] for r in rules), indexing="ij")], axis=0)
    return nodes, weights


def mixture_and_noise(data, n: int = 32):
    """Nodes of x ~ data (a one-dimensional exact.GaussianMixture) and z ~ N(0, 1): x (N, 1), z (N, 1), weights (N,)."""
    nodes, weights = product(normal(n), normal(n))
    stds = np.sqrt(data.covs[:, 0, 0])
    x = np.concatenate([m + s * nodes[:, :1] for m, s in zip(data.means[:, 0], stds)])
    z = np.concatenate([nodes[:, 1:]] * len(stds))
    return jnp.asarray(x), jnp.asarray(z), jnp.asarray(np.concatenate([w * weights for w in data.weights]))


def expected(loss, batch, weights):
    """sum_i w_i loss(example i as a batch of one), for loss(batch) -> (value, metrics)."""
    values = jax.vmap(lambda example: loss(example)[0])(jax.tree.map(lambda v: v[:, None], batch))
    return weights @ values
