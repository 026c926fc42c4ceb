"""What the tables of encoders (`vit`, `clip`, `t5`) share: scanned layers, parameters without a module, names of older files."""

import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from flowjax.interop import state_dict
from flowjax.interop.dit import stack, unstack


def from_torch(state: Mapping[str, np.ndarray], like, rename: state_dict.Rename):
    """`state_dict.from_torch` for a network with scanned "blocks"."""
    # Shapes stand for themselves without memory: a broadcast zero has a shape and can be indexed.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    return stack(state_dict.from_torch(state, unstack(zeros), rename))


def to_torch(params, rename: state_dict.Rename) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`."""
    return state_dict.to_torch(unstack(jax.tree.map(np.asarray, params)), rename)


def renamed(state: Mapping[str, np.ndarray], rules: Iterable[tuple[str, str]]) -> dict[str, np.ndarray]:
    """The state dict with each (pattern, replacement) applied to its keys in turn; ValueError where two keys become one."""
    new = {}
    for key, value in state.items():
        old = key
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if key in new:
            raise ValueError(f"two entries of the state dict mean {key!r}; one is {old!r}")
        new[key] = value
    return new


def flatten_patches(kernel: np.ndarray) -> np.ndarray:
    """Weight of a patch convolution (width, C, p, p) as that of a Linear over patches read as (row, column, channel)."""
    return np.ascontiguousarray(np.asarray(kernel).transpose(0, 2, 3, 1).reshape(kernel.shape[0], -1))


def unflatten_patches(weight: np.ndarray, patch: int) -> np.ndarray:
    """Inverse of `flatten_patches`."""
    return np.ascontiguousarray(weight.reshape(weight.shape[0], patch, patch, -1).transpose(0, 3, 1, 2))
