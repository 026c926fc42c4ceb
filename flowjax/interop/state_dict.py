"""PyTorch state dicts to and from our parameter trees, driven by one renaming function per model.

Our leaves are named by path, e.g. ("down_0_res_1", "conv_1", "kernel"). A model's file supplies `rename(module_path) ->
torch module name`; the leaf name and rank then fix the tensor transform, so nothing else has to be listed:

| ours                    | theirs             | transform             |
|-------------------------|--------------------|-----------------------|
| kernel (in, out)        | weight (out, in)   | transpose             |
| kernel (kh, kw, in, out)| weight (out, in, kh, kw) | permute         |
| scale, embedding        | weight             | none                  |
| bias                    | bias               | none                  |
"""

from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util

# leaf name -> name in the state dict
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# (leaf name, rank) -> axes of the torch tensor in our order; its inverse goes the other way
AXES = {("kernel", 2): (1, 0), ("kernel", 4): (2, 3, 1, 0)}

Rename = Callable[[tuple[str, ...]], str]


def names(params, rename: Rename) -> dict[tuple[str, ...], str]:
    """Our leaf path -> state dict key for every leaf of `params` (arrays or shapes). ValueError if two leaves share a key."""
    table = {path: f"{rename(path[:-1])}.{LEAVES[path[-1]]}" for path in traverse_util.flatten_dict(params)}
    if len(set(table.values())) < len(table):
        keys = list(table.values())
        raise ValueError(f"one key for two parameters: {sorted({k for k in keys if keys.count(k) > 1})}")
    return table


def from_torch(state: Mapping[str, np.ndarray], like, rename: Rename):
    """The parameter tree shaped as `like` (arrays or `jax.eval_shape` output, unboxed), filled from a state dict.

    Every key is consumed once and every leaf filled once: ValueError lists missing keys, leftover keys and wrong shapes.
    """
    table, shapes = names(like, rename), traverse_util.flatten_dict(like)
    missing = sorted(set(table.values()) - set(state))
    left = sorted(set(state) - set(table.values()))
    if missing or left:
        raise ValueError(f"state dict does not fit: missing {missing}; left over {left}")
    params, wrong = {}, []
    for path, key in table.items():
        leaf = np.asarray(state[key])
        axes = AXES.get((path[-1], leaf.ndim), tuple(range(leaf.ndim)))
        params[path] = np.ascontiguousarray(leaf.transpose(axes))
        if params[path].shape != shapes[path].shape:
            wrong.append(f"{key} {leaf.shape} for {'/'.join(path)} {shapes[path].shape}")
    if wrong:
        raise ValueError(f"state dict has wrong shapes: {'; '.join(wrong)}")
    return traverse_util.unflatten_dict(params)


def to_torch(params, rename: Rename) -> dict[str, np.ndarray]:
    """The state dict (contiguous NumPy arrays) of a parameter tree: the inverse of `from_torch`."""
    flat, state = traverse_util.flatten_dict(params), {}
    for path, key in names(params, rename).items():
        leaf = np.asarray(flat[path])
        axes = AXES.get((path[-1], leaf.ndim), tuple(range(leaf.ndim)))
        state[key] = np.ascontiguousarray(leaf.transpose(np.argsort(axes)))
    return state
