"""Exact log-likelihood of a flow by the instantaneous change of variables.

    log p_0(x_0) = log N(x_1; 0, b(1)^2 I) + int_0^1 div v(x_t, t) dt          (FFJORD 1810.01367 eq. 4; 2011.13456 eq. 39)

along the ODE from data to noise, which takes the data scale to be negligible, or absent, at the last time.
"""

import math

import jax
import jax.numpy as jnp

from flowjax import config
from flowjax.models.attention import jvp
from flowjax.samplers.base import normal


def exact_divergence(velocity, x, probe):
    """div v per row, (B,), by one forward derivative per dimension: for small dimensions and tests."""
    del probe
    basis = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, *x.shape[1:])

    def diagonal(direction):
        tangent = jvp(velocity, (x,), (jnp.broadcast_to(direction, x.shape),))[1]
        return _sum(tangent * direction)

    return jnp.sum(jax.vmap(diagonal)(basis), axis=0)


def hutchinson_divergence(velocity, x, probe):
    """probe . (dv/dx) probe per row, (B,): unbiased for probes of zero mean and unit covariance."""
    return _sum(probe * jvp(velocity, (x,), (probe,))[1])


def _rademacher(key, x):
    # Signs of normals keep one definition of per-row streams.
    return jnp.where(normal(key, x) > 0, 1.0, -1.0).astype(x.dtype)


DIVERGENCES = {"exact": exact_divergence, "hutchinson": hutchinson_divergence}
PROBES = {"rademacher": _rademacher, "gaussian": normal}


def log_likelihood(model, x, key, times, divergence: str = "hutchinson", probe: str = "rademacher", cond=None):
    """(log p_0(x) in nats (B,), x_1 (B, ...)) for x (B, ...), by RK4 over `times`, increasing from data to noise.

    One probe per trajectory, as the integral of one quadratic form is what has to be unbiased. The variance for a
    Jacobian with symmetric part S is 2 (|S|^2 - sum S_ii^2) for Rademacher and 2 |S|^2 for Gaussian probes.
    """
    estimate = config.lookup(DIVERGENCES, divergence, "likelihood.divergence")
    r = config.lookup(PROBES, probe, "likelihood.probe")(key, x)
    model = model.bind(cond)
    times = jnp.asarray(times, jnp.promote_types(x.dtype, jnp.float32))
    x = x.astype(times.dtype)

    def rates(x, t):
        velocity = lambda x: model.get("velocity", x, t)
        return velocity(x), estimate(velocity, x, r)

    def rk4(state, interval):
        x, integral = state
        t, s = interval
        h = s - t
        k1, d1 = rates(x, t)
        k2, d2 = rates(x + h / 2 * k1, t + h / 2)
        k3, d3 = rates(x + h / 2 * k2, t + h / 2)
        k4, d4 = rates(x + h * k3, s)
        return (x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), integral + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    start = (x, jnp.zeros(x.shape[:1], times.dtype))
    (noise, integral), _ = jax.lax.scan(rk4, start, (times[:-1], times[1:]))
    b = model.path.b(times[-1])
    dims = x[0].size
    log_prior = -0.5 * _sum((noise / b) ** 2) - dims * (jnp.log(b) + 0.5 * math.log(2 * math.pi))
    return log_prior + integral, noise


def bits_per_dim(log_p, dims: int, levels: int = 256, width: float = 2.0):
    """-log p / (D ln 2) + log2(levels / width), for data of `levels` values on an interval of `width` (2 for [-1, 1])."""
    return -log_p / (dims * math.log(2)) + math.log2(levels / width)


def _sum(u):
    return jnp.sum(u, axis=tuple(range(1, u.ndim)))
