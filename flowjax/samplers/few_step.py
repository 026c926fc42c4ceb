"""Few steps: one-step generators that jump to the data and are noised again, and flow maps that jump from time to time.

Source: consistency models 2303.01469 Alg. 1, which is also the sampler of LCM, ADD, LADD and DMD2. CM's noise
sqrt(sigma_s^2 - sigma_min^2) is b(s) up to the floor sigma_min that the network has removed only to.
"""

import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.samplers.base import Sampler, is_last, normal


def renoise_step(model, x, t, s, key, carry):
    """x_s = a_s x_hat + b_s xi, and x_hat itself at the clean end; the model's x-prediction is the consistency function."""
    path = model.path
    x_hat = model.get("x", x, t)
    return jnp.where(is_last(path, s), x_hat, path.a(s) * x_hat + path.b(s) * normal(key, x)), carry


def flow_map_step(model, x, t, s, key, carry):
    """x_s = x_t - (t - s) u(x_t, t, t - s), u the network's mean velocity over the step (MeanFlow 2505.13447)."""
    if not model.step_embed or model.prediction != "velocity":
        raise ConfigError("sampler 'flow_map' needs a network of mean velocities: prediction 'velocity' and model.step_embed = True")
    h = t - s
    return x - h * model(x, t, {"step": jnp.broadcast_to(h, x.shape[:1]).astype(x.dtype)}), carry


def flow_map() -> Sampler:
    """Steps of a flow map (MeanFlow, shortcut models)."""
    return Sampler(flow_map_step)


def renoise() -> Sampler:
    """Consistency-style sampling at the given times."""
    return Sampler(renoise_step)
