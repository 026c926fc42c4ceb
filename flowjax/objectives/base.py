"""The shape of an objective and the few operations that several of them share."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, build
from flowjax.guidance import GUIDANCE
from flowjax.models import perceptual
from flowjax.paths import Path, expand

# Arguments that the train step supplies; every other argument of a loss or rollout is a setting.
GIVEN = ("nets", "batch", "key")


class Player(NamedTuple):
    """One trained role: `loss` is minimised over params[role] every `every` steps.

    measure(nets, batch, key, **settings) -> tree is for losses that depend on a mean over the whole batch in another way than
    linearly (a ratio of gradient norms): the loss finds that mean, taken over all slices and without gradient, in batch["measured"].
    """

    role: str
    loss: Callable
    every: int = 1
    measure: Callable | None = None


class Objective(NamedTuple):
    """roles: role -> "trained" | "frozen" | "optional" (frozen, where the run has it) | "ema:<role>"; players in the order of their
    updates; kinds: what a role's network has to be (one of several), where the objective calls for something other than a denoiser; whole: rows are
    compared with each other, so that the losses of slices are not parts of the loss, and accumulation is refused; coupled: takes
    the noise batch["z"] that the data bring along (couplings), where they do; conditions: name (of flowjax.conditions) -> shape of one
    example, of what the rollout adds to the batch's cond and the data do not have; shared: frozen denoisers are asked with these as well; reads: role -> image encoder whose grid of tokens it
    takes instead of examples, where the run has that encoder; pixels: looks at images, which roles.vae, where there is one, decodes:
    data that are latents already are refused; judged: takes the mark batch["desirable"] of data that have one."""

    roles: Mapping[str, str]
    players: tuple[Player, ...]
    rollout: Callable | None = None
    kinds: Mapping[str, str | tuple[str, ...]] = {}
    whole: bool = False
    coupled: bool = False
    conditions: Mapping[str, tuple[int, ...]] = {}
    shared: bool = False
    reads: Mapping[str, str] = {}
    pixels: bool = False
    judged: bool = False


def mean_dims(x):
    """Mean over all axes but the first: (B, ...) -> (B,), in float32."""
    return jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=tuple(range(1, x.ndim)))


def perceptual_error(nets, weight: float, x, x_hat):
    """(weight d(x, x_hat) (B,), its metrics) in the features of roles.perceptual, (0, {}) without one; ConfigError where only one of
    objective.perceptual_weight and roles.perceptual is there, or the network has no features to compare."""
    if bool(weight) != ("perceptual" in nets):
        raise ConfigError(f"objective.perceptual_weight = {weight} and roles.perceptual go together: both or neither")
    if not weight:
        return 0.0, {}
    if not hasattr(nets["perceptual"], "feature_maps"):
        raise ConfigError("roles.perceptual: this network has no feature maps; valid: lpips, classifier")
    d = perceptual.distance(nets["perceptual"], x, x_hat)
    return weight * d, {"perceptual": jnp.mean(d)}


def same_meaning(found, wanted, where: str, what=("path", "prediction")):
    """ConfigError that names the first of `what` in which a network from elsewhere differs from the config's: shapes alone do not
    tell. Both are Models, or the Roles (flowjax.train.roles) that these come from, which also have a "scaling"."""

    def told(value):
        if isinstance(value, Path):
            return value.name, *value.settings
        return (value.func.__name__, value.keywords) if isinstance(value, functools.partial) else value

    for name in what:
        a, b = (told(getattr(network, name)) for network in (found, wanted))
        if a != b:
            raise ConfigError(f"{where} was trained with another {name} than the config's: {a} is not {b}")


def guided(teacher, guidance):
    """The teacher in its guidance, a section of flowjax.guidance or "none"; ConfigError where that remembers the step before."""
    if guidance == "none":
        return teacher
    teacher = build(GUIDANCE, guidance, "objective.guidance", model=teacher)
    if teacher.memory is not None:
        raise ConfigError(f"objective.guidance = {guidance!r}: momentum goes from step to step of a sampler, and a teacher is asked once; leave it out")
    return teacher


def guidance_scale(net, key, count: int, scale_min: float, scale_max: float):
    """Scales of guidance (count,), uniform in [scale_min, scale_max], for a network that takes them as cond["guidance"]."""
    if not net.guidance_embed:
        raise ConfigError("this objective trains a network that takes the scale as an input: set model.guidance_embed = True")
    if not scale_min <= scale_max:
        raise ConfigError(f"objective.scale_max = {scale_max} should be at least objective.scale_min = {scale_min}")
    return jax.random.uniform(key, (count,), jnp.float32, scale_min, scale_max)


def drop_condition(net, cond, key, rate: float):
    """Replace each example's whole condition by the null condition with probability `rate` (2207.12598)."""
    return drop_rows(net, cond, key, rate)[0]


def drop_rows(net, cond, key, rate: float, rows: int = 0):
    """(`drop_condition`'s result, which of the rows it replaced); rows: how many there are, where the condition may be empty."""
    none = jnp.zeros(rows, bool)
    if rate == 0.0:
        return cond, none
    if net.null is None:
        raise ConfigError("objective.label_drop > 0 needs a network with a null condition (model.num_classes > 0, or captions)")
    if not cond:
        return cond, none
    null = net.null(cond)
    drop = jax.random.bernoulli(key, rate, next(iter(cond.values())).shape[:1])
    return {k: jnp.where(expand(drop, v), null[k], v) for k, v in cond.items()}, drop
