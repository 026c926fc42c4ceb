"""Langevin dynamics at a fixed noise level: annealed (NCSN) and as the corrector of a predictor (score SDE).

    x <- x + eta score(x, t) + sqrt(2 eta) xi

Sources: NCSN 1907.05600, whose paper lists alpha/2 and sqrt(alpha) while its code takes eta = alpha as written here;
NCSNv2 2006.09011; predictor-corrector 2011.13456 app. G, in the order of its code (corrector first).
"""

import functools

import jax
import jax.numpy as jnp

from flowjax import config
from flowjax.config import ConfigError
from flowjax.samplers import ddim, ode
from flowjax.samplers.base import Sampler, fold_in, is_last, normal


def langevin(model, x, t, key, eta):
    """One update at noise level t, with a scalar eta."""
    return x + eta * model.get("score", x, t) + jnp.sqrt(2 * eta) * normal(key, x)


def annealed_step(model, x, t, s, key, carry, *, updates, step_size, denoise):
    """`updates` Langevin updates at level t with eta = step_size b(t)^2, then on to the level s."""
    path = model.path
    eta = step_size * path.b(t) ** 2
    # Unrolled: the first model call of a step must not be inside a loop (see samplers.sample, memory).
    for i in range(updates):
        x = langevin(model, x, t, fold_in(key, i), eta)
    has_signal = path.a(t) > 1e-6
    scaled = jnp.where(has_signal, path.a(s) / jnp.where(has_signal, path.a(t), 1.0), 1.0) * x
    if denoise:
        scaled = jax.lax.cond(is_last(path, s), lambda: model.get("x", x, t), lambda: scaled)
    return scaled, carry


def predictor_corrector_step(model, x, t, s, key, carry, *, predictor, corrector_updates, snr):
    """Corrector at level t with eta = 2 (snr b(t))^2, then the predictor from t to s.

    The paper's code takes eta = 2 (snr |xi| / |score|)^2 with norms averaged over the batch. For score = -z / b that ratio
    is b. Written so, a row does not depend on its neighbours, nor the step size on the noise it multiplies.
    """
    eta = 2 * (snr * model.path.b(t)) ** 2
    for i in range(corrector_updates):  # unrolled as above
        x = langevin(model, x, t, fold_in(key, i + 1), eta)
    return predictor(model, x, t, s, fold_in(key, 0), carry)


PREDICTORS = {"ancestral": ddim.ancestral_step, "ddim": ddim.ddim_step, "euler": ode.euler_step}


def annealed_langevin(updates: int = 5, step_size: float = 0.062, denoise: bool = True) -> Sampler:
    """NCSN's sampler, for paths with constant a (`ve`, `edm`); elsewhere a level starts from a rescaled state.

    step_size: eta at noise level 1, in units of b^2; NCSNv2's step_lr = 6.2e-6 with sigma_L = 0.01 is 0.062. denoise: end
    with x_hat instead of a sample at the last level but one. Repeat a level in `times` for very many updates.
    """
    if updates < 1:
        raise ConfigError(f"sampler.updates = {updates} should be at least 1")
    step = functools.partial(annealed_step, updates=updates, step_size=step_size, denoise=denoise)
    return Sampler(step, calls=updates, denoises=denoise)


def predictor_corrector(predictor: str = "ancestral", corrector_updates: int = 1, snr: float = 0.16) -> Sampler:
    """Predictor-corrector; snr 0.16 for CIFAR-10, 0.15 for faces and 0.075 for LSUN at 256 px in the paper."""
    step = config.lookup(PREDICTORS, predictor, "sampler.predictor")
    if corrector_updates < 0:
        raise ConfigError(f"sampler.corrector_updates = {corrector_updates} should not be negative")
    settings = dict(predictor=step, corrector_updates=corrector_updates, snr=snr)
    return Sampler(functools.partial(predictor_corrector_step, **settings), calls=1 + corrector_updates)
