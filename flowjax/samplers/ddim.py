"""DDIM and DDPM's ancestral sampling on any Gaussian path, from (x_hat, z_hat) of one model call.

Sources: DDPM 2006.11239; DDIM 2010.02502 eq. 12 and 16, with alpha-bar = a^2 and 1 - alpha-bar = b^2, neither of which
needs a^2 + b^2 = 1. Both are finite at a(t) = 0, provided the model determines x_hat there, and at b(s) = 0.
"""

import functools

import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.samplers.base import Sampler, is_last, normal


def ddim_step(model, x, t, s, key, carry, *, eta=0.0, clip=None):
    """x_s = a_s x_hat + sqrt(b_s^2 - k^2) z_hat + k xi, k = eta (b_s/b_t) sqrt(b_t^2 - (a_t/a_s)^2 b_s^2)."""
    path = model.path
    x_hat, z_hat = _clipped(model, x, t, clip)
    if not eta:
        return path.a(s) * x_hat + path.b(s) * z_hat, carry
    k = eta * jnp.sqrt(path.posterior_variance(t, s))
    rest = jnp.sqrt(jnp.maximum(path.b(s) ** 2 - k**2, 0.0))
    return path.a(s) * x_hat + rest * z_hat + jnp.where(is_last(path, s), 0.0, k) * normal(key, x), carry


def ancestral_step(model, x, t, s, key, carry, *, variance="small", clip=None):
    """A draw from q(x_s | x_t, x_hat), or from as wide a law as the forward transition's."""
    path = model.path
    x_hat, _ = _clipped(model, x, t, clip)
    if variance == "small":
        wanted = path.posterior_variance(t, s)
    else:
        wanted = path.b(t) ** 2 - (path.a(t) / path.a(s) * path.b(s)) ** 2
    std = jnp.where(is_last(path, s), 0.0, jnp.sqrt(jnp.maximum(wanted, 0.0)))
    return path.posterior_mean(x, x_hat, t, s) + std * normal(key, x), carry


def _clipped(model, x, t, clip):
    x_hat, z_hat = model.x_and_z(x, t)
    if clip is None:
        return x_hat, z_hat
    x_hat = jnp.clip(x_hat, -clip, clip)
    return x_hat, (x - model.path.a(t) * x_hat) / model.path.b(t)


def ddim(eta: float = 0.0, clip: float | None = None) -> Sampler:
    """DDIM; eta = 0 is deterministic, eta = 1 is ancestral sampling. clip: keep x_hat within [-clip, clip]."""
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"sampler.eta = {eta} should lie in [0, 1]")
    return Sampler(functools.partial(ddim_step, eta=eta, clip=clip))


def ancestral(variance: str = "small", clip: float | None = None) -> Sampler:
    """DDPM sampling with the posterior's variance ("small") or the forward transition's ("large")."""
    if variance not in ("small", "large"):
        raise ConfigError(f"sampler.variance = {variance!r} is unknown; valid: small, large")
    return Sampler(functools.partial(ancestral_step, variance=variance, clip=clip))
