"""Stochastic samplers with the marginals of the ODE: Euler-Maruyama with any diffusion, and EDM's churn.

For every g(t) >= 0 the reverse-time SDE (2011.13456 eq. 6 for the forward g; 2401.08740 eq. 7 for any)

    x_s = x_t - h v + (g^2 / 2) h score + g sqrt(h) xi

keeps p_t. We name the coefficient Dif = g^2 / 2, as SiT's code does (its drift v + Dif score, its noise sqrt(2 Dif dt));
SiT's paper writes w = g^2. Dif = sbdm is half the forward SDE's g^2, which makes this Anderson's reversal.
"""

import functools
import math

import jax.numpy as jnp

from flowjax import config
from flowjax.config import ConfigError
from flowjax.paths import expand
from flowjax.predictions import convert
from flowjax.samplers import ode
from flowjax.samplers.base import Sampler, is_last, normal


def _sbdm(path, t, s):
    # Infinite where a = 0. Any Dif is valid, so we take the ODE's there instead of a clipped one.
    a = path.a(t)
    has_signal = a > 1e-6
    return jnp.where(has_signal, path.b(t) * path.wronskian(t) / jnp.where(has_signal, a, 1.0), 0.0)


def _flow_grpo(path, t, s):
    # sbdm, with the a of the step's end where its own is 0, as the code of Flow-GRPO (2505.05470) has it: on the rectified path scale
    # = k^2 / 2 is its sigma_t = k sqrt(t / (1 - t)), and the noise of the first step has the standard deviation k on every grid. Also
    # where a is next to nothing, as at the start of a grid for eps: there Dif times the step would not be small.
    a, end = path.a(t), path.a(s)
    return path.b(t) * path.wronskian(t) / jnp.where(a < 0.1 * end, end, a)


# name -> Dif(path, t, s) = g^2 / 2 in the step from t to s (SiT transport/path.py, with its time reversed)
DIFFUSIONS = {
    "constant": lambda path, t, s: jnp.ones_like(t),
    "sbdm": _sbdm,
    "sigma": lambda path, t, s: path.b(t),
    "linear": lambda path, t, s: t,
    "decreasing": lambda path, t, s: (1 - jnp.cos(math.pi * t)) ** 2 / 4,
    "increasing_decreasing": lambda path, t, s: jnp.sin(math.pi * t) ** 2,
    "flow_grpo": _flow_grpo,
}


def transition(model, x, t, s, diffusion="sbdm", scale=1.0):
    """Mean (shape of x) and standard deviation (shape of t) of x_s given x_t in one Euler-Maruyama step, from one model call.

    t and s: scalar or (B,). scale may be traced.
    """
    mean, std, _ = _transition(model, x, t, s, diffusion, scale)
    return mean, std


def _transition(model, x, t, s, diffusion, scale):
    h, y = t - s, model(x, t)
    mean = x - expand(h, x) * convert(model.path, model.prediction, "velocity", y, x, t)
    if isinstance(scale, (int, float)) and not scale:
        return mean, jnp.zeros_like(h), y
    dif = scale * DIFFUSIONS[diffusion](model.path, t, s)
    score = convert(model.path, model.prediction, "score", y, x, t)
    return mean + expand(dif * h, x) * score, jnp.sqrt(2 * dif * h), y


def euler_maruyama_step(model, x, t, s, key, carry, *, diffusion, scale, last):
    """One step of the SDE; at the clean end its mean, the ODE's Euler step, or x_hat, without noise."""
    mean, std, y = _transition(model, x, t, s, diffusion, scale)
    clean = mean
    if last == "euler":
        clean = x - (t - s) * convert(model.path, model.prediction, "velocity", y, x, t)
    if last == "denoise":
        clean = convert(model.path, model.prediction, "x", y, x, t)
    return jnp.where(is_last(model.path, s), clean, mean + std * normal(key, x)), carry


def churn_step(model, x, t, s, key, gamma, *, s_min, s_max, s_noise):
    """EDM's Algorithm 2 on any path: raise the noise level to (1 + gamma) sigma, then a Heun step from there to s.

    The time is raised to at most path.t_max, and not at all where sigma is infinite.
    """
    path = model.path
    a, b = path.a(t), path.b(t)
    sigma = b / jnp.where(a > 1e-6, a, 1.0)
    churned = (a > 1e-6) & (s_min <= sigma) & (sigma <= s_max)
    raised = jnp.minimum(path.time_of_sigma(sigma * (1 + gamma)), path.t_max)
    t_hat = jnp.where(churned, jnp.maximum(raised, t), t)
    ratio = jnp.where(churned, path.a(t_hat) / jnp.where(churned, a, 1.0), 1.0)
    std = s_noise * jnp.sqrt(jnp.maximum(path.b(t_hat) ** 2 - (ratio * b) ** 2, 0.0))
    x_hat = ratio * x + jnp.where(churned, std, 0.0) * normal(key, x)
    x, _ = ode.heun_step(model, x_hat, t_hat, s, None, ())
    return x, gamma


def euler_maruyama(diffusion: str = "sbdm", scale: float = 1.0, last: str = "mean") -> Sampler:
    """Euler-Maruyama with Dif = scale * DIFFUSIONS[diffusion]; scale = 0 is Euler.

    last: what the step to the clean end returns: "mean" (SiT's default), "euler" (the ODE step) or "denoise" (x_hat). SiT
    makes that step 0.04 long.
    """
    config.lookup(DIFFUSIONS, diffusion, "sampler.diffusion")
    if last not in ("mean", "euler", "denoise"):
        raise ConfigError(f"sampler.last = {last!r} is unknown; valid: mean, euler, denoise")
    if scale < 0:
        raise ConfigError(f"sampler.scale = {scale} should not be negative")
    return Sampler(functools.partial(euler_maruyama_step, diffusion=diffusion, scale=scale, last=last))


def churn(churn: float = 40.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0) -> Sampler:
    """EDM's stochastic sampler (2206.00364 Alg. 2); `churn` is S_churn, so that gamma = min(churn / steps, sqrt 2 - 1).

    s_min, s_max: noise levels sigma = b/a between which it churns. EDM on ImageNet-64: 256 steps, 40, 0.05, 50, 1.003.
    """
    if churn < 0:
        raise ConfigError(f"sampler.churn = {churn} should not be negative")

    def init(x, times):
        return jnp.asarray(min(churn / (len(times) - 1), math.sqrt(2) - 1), times.dtype)

    step = functools.partial(churn_step, s_min=s_min, s_max=s_max, s_noise=s_noise)
    return Sampler(step, init, calls=2, ends_with_euler=True)
