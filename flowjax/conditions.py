"""What networks are conditioned on besides time: a dict of arrays, one row an example. Told apart by name, described by shape.

    label     int32 ()           class
    tokens    int32 (L,)         token ids of a caption, for networks and roles that have a text encoder (0 is padding)
    text      float32 (S, D)     embedded caption, one vector a token
    pooled    float32 (D,)       embedded caption, one vector in all
    guidance  float32 ()         scale that a guidance-distilled network takes as an input (guidance_embed); not of the data
    step      float32 ()         t - s, over which a flow map's velocity is the average (step_embed); not of the data
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError

CAPTION = ("tokens", "text", "pooled")  # those that say what a caption says
DTYPES = {"label": jnp.int32, "tokens": jnp.int32, "text": jnp.float32, "pooled": jnp.float32, "guidance": jnp.float32, "step": jnp.float32}


def zeros(shapes: Mapping, rows: int) -> dict[str, jax.Array]:
    """A condition of `rows` zeros for {name: shape of one example}."""
    return {k: jnp.zeros((rows, *shape), DTYPES[k]) for k, shape in shapes.items()}


def need(cond: Mapping, name: str, network: str) -> jax.Array:
    """cond[name], or a ConfigError that says which network wants it and what is there."""
    if name not in cond:
        raise ConfigError(f"{network} needs cond[{name!r}]; cond has {list(cond)}")
    return cond[name]


def shapes_of(cond: Mapping) -> dict[str, tuple[int, ...]]:
    """{name: shape of one example} of a condition."""
    return {k: tuple(v.shape[1:]) for k, v in cond.items()}


def embed(encoder, cond: Mapping) -> dict[str, jax.Array]:
    """tokens -> "text" and "pooled", by a text encoder; the rest, and what is embedded already, stays."""
    if "tokens" not in cond:
        return dict(cond)
    sequence, pooled = encoder(cond["tokens"])
    return {**{k: v for k, v in cond.items() if k != "tokens"}, "text": sequence, "pooled": pooled}


class Watched(dict):
    """A condition that keeps the names it was asked for in `read`."""

    def __init__(self, cond: Mapping):
        super().__init__(cond)
        self.read: set[str] = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)
