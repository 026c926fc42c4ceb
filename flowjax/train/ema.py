"""Averages of parameters over training: constant, warmed-up, and EDM2's power-function profile.

An average named in config.ema follows one trained role and is updated after every step:

    ema = decay(step) ema + (1 - decay(step)) params,    float32

Sources: constant 2006.11239; warm-up min(decay, (1 + n)/(10 + n)) as in the TF and diffusers practice; power function
2312.02696 eq. 123-127: decay = (1 - 1/n)^(gamma + 1), n counting updates from 1; ramp 2509.16117.
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


def ramp(decay: float = 0.5, slope: float = 0.001, delay: int = 0) -> Callable:
    """min(decay, slope (n - delay)) at update n = 1, 2, ..., and 0 until `delay`: the sampling policy of DiffusionNFT (2509.16117),
    at first the network itself. The authors have two: the default, and decay 0.999, slope 0.0075, delay 75."""
    _in_unit("decay", decay)
    return lambda n: jnp.clip(slope * (n - delay), 0.0, decay).astype(jnp.float32)


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


DECAYS = {"constant": constant, "warmup": warmup, "power": power, "ramp": ramp}


def half_life(decay: Callable, step: int) -> float:
    """Updates after which a parameter's weight has halved, for the decay in force at `step`."""
    d = float(decay(jnp.asarray(step, jnp.float32)))
    return 0.0 if d <= 0 else math.inf if d >= 1 else math.log(0.5) / math.log(d)


def update(average, params, decay):
    """One update in float32, leaf by leaf."""
    return jax.tree.map(lambda e, p: e * decay + p.astype(e.dtype) * (1 - decay), average, params)


def _common(of: str = "net", snapshot_every: int = 0):
    """The role that is averaged; for power averages, how often a snapshot is kept for flowjax.train.posthoc (0 = never)."""


def _sections(section, where: str):
    """(name, own settings, common settings) of an entry of config.ema."""
    name, settings = config.split(section, where)
    common, own = config.arguments(_common), config.arguments(config.lookup(DECAYS, name, f"{where}.name"))
    for key in settings:
        if key not in common and key not in own:
            raise config.ConfigError(f"{where}.{key} is unknown; valid: {', '.join([*own, *common])}")
    shared = config.check(_common, {k: v for k, v in settings.items() if k in common}, where)
    return name, {k: v for k, v in settings.items() if k in own}, {k: p.default for k, p in common.items()} | shared


def build(section, where: str):
    """(decay function, role averaged) of one entry of config.ema: {"name", "of", ...settings}."""
    name, settings, common = _sections(section, where)
    return config.build(DECAYS, {"name": name, **settings}, where), common["of"]


def snapshots(section, where: str):
    """(std, every) of a power average that keeps snapshots, else None."""
    name, settings, common = _sections(section, where)
    every = common["snapshot_every"]
    if every < 0 or (every and name != "power"):
        raise config.ConfigError(f"{where}.snapshot_every = {every} must be at least 0, and is for power averages only")
    return (settings.get("std", config.arguments(power)["std"].default), every) if every else None
