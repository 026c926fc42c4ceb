"""Averages of parameters over training: constant, warmed-up, and EDM2's power-function profile.

An average named in config.ema follows one trained role and is updated after every step:

    ema = decay(step) ema + (1 - decay(step)) params,    float32

Sources: constant 2006.11239; warm-up min(decay, (1 + n)/(10 + n)) as in the TF and diffusers practice; power function
2312.02696 eq. 123-127: decay = (1 - 1/n)^(gamma + 1), n counting updates from 1.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import config


def constant(decay: float = 0.999) -> Callable:
    """A fixed decay in [0, 1); 0 copies the parameters."""
    _in_unit("decay", decay)
    return lambda n: jnp.asarray(decay, jnp.float32)


def warmup(decay: float = 0.9999) -> Callable:
    """min(decay, (1 + n)/(10 + n)) at update n = 1, 2, ...: short memory while everything still moves."""
    _in_unit("decay", decay)
    return lambda n: jnp.minimum(decay, (1.0 + n) / (10.0 + n)).astype(jnp.float32)


def power(std: float = 0.1) -> Callable:
    """Power-function profile of relative width `std` (EDM2 trains with 0.05 and 0.10): length grows with training."""
    gamma = gamma_of_std(std)
    return lambda n: ((1.0 - 1.0 / n) ** (gamma + 1)).astype(jnp.float32)


def _in_unit(name, value):
    if not 0.0 <= value < 1.0:
        raise config.ConfigError(f"ema.{name} = {value} must lie in [0, 1)")


def gamma_of_std(std: float) -> float:
    """gamma of the profile whose standard deviation is `std` of the training length (2312.02696 alg. 2)."""
    if not 0.0 < std < 1 / math.sqrt(12):
        raise config.ConfigError(f"ema.std = {std} must lie in (0, 0.2887)")
    # std^2 = (g + 1) / ((g + 2)^2 (g + 3)): the largest root in g of g^3 + 7 g^2 + (16 - s) g + 12 - s = 0, s = std^-2.
    s = std**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


DECAYS = {"constant": constant, "warmup": warmup, "power": power}


def half_life(decay: Callable, step: int) -> float:
    """Updates after which a parameter's weight has halved, for the decay in force at `step`."""
    d = float(decay(jnp.asarray(step, jnp.float32)))
    return 0.0 if d <= 0 else math.inf if d >= 1 else math.log(0.5) / math.log(d)


def update(average, params, decay):
    """One update in float32, leaf by leaf."""
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1 - decay), average, params)


def build(section, where: str):
    """(decay function, role averaged) of one entry of config.ema: {"name", "of", ...settings}."""
    name, settings = config.split(section, where)
    of = settings.pop("of", "net")
    return config.build(DECAYS, {"name": name, **settings}, where), of
