"""DPM-Solver++(2M) (2211.01095 Alg. 2) and its SDE form: second order in half the log-SNR, one model call per step.

With l = log(a/b), H = l_s - l_t > 0 and H0 the H of the step before, and D the x-prediction,

    Dbar = D_t + (H / 2 H0) (D_t - D_prev)          x_s = (b_s/b_t) x_t - a_s (e^-H - 1) Dbar

The first step is first order (= DDIM), and so are the step from a = 0, the step after it (H0 infinite) and the step to b = 0.
"""

import functools

import jax.numpy as jnp

from flowjax.samplers.base import Sampler, is_last, normal


def dpmpp_2m_step(model, x, t, s, key, carry, *, stochastic=False):
    """carry: (D_prev (B, ...), H0 scalar)."""
    previous, previous_step = carry
    path = model.path
    a_t, b_t, a_s, b_s = path.a(t), path.b(t), path.a(s), path.b(s)
    # e^-H as a ratio, which is exact at both ends of the path where H is infinite. cos(pi/2) rounds below zero.
    decay = jnp.maximum(a_t, 0.0) * b_s / (a_s * b_t)
    finite = decay > 0
    step = jnp.where(finite, -jnp.log(jnp.where(finite, decay, 1.0)), jnp.inf)
    x_hat = model.get("x", x, t)
    weight = jnp.where(finite, step, 0.0) / (2 * previous_step)
    extrapolated = x_hat + weight * (x_hat - previous)
    gain = jnp.where(finite, -jnp.expm1(-step), 1.0)
    if stochastic:
        # 1 - e^-2H, without cancellation for small H.
        power = jnp.where(finite, -jnp.expm1(-2 * step), 1.0)
        noise = jnp.where(is_last(path, s), 0.0, b_s * jnp.sqrt(power)) * normal(key, x)
        x = b_s / b_t * decay * x + a_s * power * extrapolated + noise
    else:
        x = b_s / b_t * x + a_s * gain * extrapolated
    return x, (x_hat, step)


def _init(x, times):
    return jnp.zeros_like(x), jnp.asarray(jnp.inf, times.dtype)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M)."""
    return Sampler(dpmpp_2m_step, _init)


def dpmpp_2m_sde() -> Sampler:
    """SDE-DPM-Solver++(2M)."""
    return Sampler(functools.partial(dpmpp_2m_step, stochastic=True), _init)
