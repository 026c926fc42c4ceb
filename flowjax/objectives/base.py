"""The shape of an objective and the few operations that several of them share."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError

# Arguments that the train step supplies; every other argument of a loss or rollout is a setting.
GIVEN = ("nets", "batch", "key")


class Player(NamedTuple):
    """One trained role: `loss` is minimised over params[role] every `every` steps."""

    role: str
    loss: Callable
    every: int = 1


class Objective(NamedTuple):
    """roles: role -> "trained" | "frozen" | "ema:<role>"; players in the order of their updates."""

    roles: Mapping[str, str]
    players: tuple[Player, ...]
    rollout: Callable | None = None


def mean_dims(x):
    """Mean over all axes but the first: (B, ...) -> (B,), in float32."""
    return jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=tuple(range(1, x.ndim)))


def drop_condition(net, cond, key, rate: float):
    """Replace each example's whole condition by the null condition with probability `rate` (2207.12598)."""
    if rate == 0.0:
        return cond
    if net.null is None:
        raise ConfigError("objective.label_drop > 0 needs a network with a null condition (model.num_classes > 0)")
    if not cond:
        return cond
    null = net.null(cond)
    drop = jax.random.bernoulli(key, rate, (next(iter(cond.values())).shape[0],))
    return {k: jnp.where(drop.reshape((-1,) + (1,) * (v.ndim - 1)), null[k], v) for k, v in cond.items()}
