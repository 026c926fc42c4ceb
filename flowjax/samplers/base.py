"""What every sampler shares: its type, the noise it draws, and where a trajectory ends.

A step goes from t to s < t with h = t - s > 0 and calls the bound model as model(x, t) as often as it likes:

    step(model, x, t, s, key, carry) -> (x, carry)          x (B, ...), t and s scalars
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from flowjax.paths import Path

# Predictions that determine a finite velocity where b = 0; the others divide by b there.
FLOWS = ("velocity", "v")


class Sampler(NamedTuple):
    """A step, the start of its carry, and its model calls per step.

    init(x, times) -> carry, from the initial state (B, ...) and the N + 1 times. `calls` is None where only the run decides.
    `ends_with_euler`: where the last step reaches b = 0 and the model is none of FLOWS, that step calls the model once.
    `denoises`: a step to the clean end of the path calls the model once more.
    """

    step: Callable[..., Any]
    init: Callable[..., Any] = lambda x, times: ()
    calls: int | None = 1
    ends_with_euler: bool = False
    denoises: bool = False


def normal(key, x):
    """Standard normal noise like x (B, ...). `key` is one key, or (B,) keys that give each row its own stream.

    One key draws the same number for element i whatever the sharding and the batch size (jax_threefry_partitionable), so
    a row depends on its place in the batch only; with (B,) keys it does not even depend on that.
    """
    if key.ndim:
        return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(key)
    return jax.random.normal(key, x.shape, x.dtype)


def fold_in(key, data):
    """jax.random.fold_in for one key or (B,) keys."""
    if key.ndim:
        return jax.vmap(jax.random.fold_in, (0, None))(key, data)
    return jax.random.fold_in(key, data)


def is_last(path: Path, s):
    """Whether s is the clean end of the path, where stochastic samplers add no noise."""
    return s <= path.t_min
