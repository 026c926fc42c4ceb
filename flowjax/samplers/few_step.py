"""Multistep sampling of one-step generators: jump to data, add fresh noise, jump again.

Source: consistency models 2303.01469 Alg. 1, which is also the sampler of LCM, ADD, LADD and DMD2. CM's noise
sqrt(sigma_s^2 - sigma_min^2) is b(s) up to the floor sigma_min that the network has removed only to.
"""

import jax.numpy as jnp

from flowjax.samplers.base import Sampler, is_last, normal


def renoise_step(model, x, t, s, key, carry):
    """x_s = a_s x_hat + b_s xi, and x_hat itself at the clean end; the model's x-prediction is the consistency function."""
    path = model.path
    x_hat = model.get("x", x, t)
    return jnp.where(is_last(path, s), x_hat, path.a(s) * x_hat + path.b(s) * normal(key, x)), carry


def renoise() -> Sampler:
    """Consistency-style sampling at the given times."""
    return Sampler(renoise_step)
