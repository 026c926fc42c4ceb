"""`flowjax.models.dit.DiT` <-> the state dict of diffusers' `DiTTransformer2DModel`.

Every block of theirs owns a copy of the timestep MLP and the label table, and the last layer uses block 0's; ours has one of
each. The copies must therefore agree when read, and are repeated when written. Settings that correspond:

| DiT (conditioning "adaln_zero", norm "layer", mlp "gelu") | DiTTransformer2DModel                                  |
|------------------------------------------------------------|-------------------------------------------------------|
| depth, heads, width / heads, patch                          | num_layers, num_attention_heads, attention_head_dim, patch_size |
| num_classes                                                 | num_embeds_ada_norm                                   |
| learn_sigma with return_sigma                               | out_channels = 2 in_channels                          |
| frequency_shift = 1                                         | always                                                |
| eps 1e-6 in every norm                                      | norm_eps=1e-6 (it reaches only the norm before the MLP) |
| time_scale * t                                              | timestep                                              |
"""

import re

import jax
import numpy as np

from flowjax.interop import state_dict
from flowjax.models.dit import DiT

EMBEDDERS = "norm1.emb."
TOP = {
    ("x_embed",): "pos_embed.proj",
    ("t_embed", "fc1"): f"transformer_blocks.0.{EMBEDDERS}timestep_embedder.linear_1",
    ("t_embed", "fc2"): f"transformer_blocks.0.{EMBEDDERS}timestep_embedder.linear_2",
    ("y_embed",): f"transformer_blocks.0.{EMBEDDERS}class_embedder.embedding_table",
    ("final", "adaln"): "proj_out_1",
    ("final", "linear"): "proj_out_2",
}
BLOCK = {
    ("adaln",): "norm1.linear",
    ("attn", "q"): "attn1.to_q",
    ("attn", "k"): "attn1.to_k",
    ("attn", "v"): "attn1.to_v",
    ("attn", "out"): "attn1.to_out.0",
    ("mlp", "fc1"): "ff.net.0.proj",
    ("mlp", "fc2"): "ff.net.2",
}


def rename(path: tuple[str, ...]) -> str:
    """Our module path, layers not stacked, as diffusers names it; ValueError where it has no such module."""
    if path in TOP:
        return TOP[path]
    block = re.fullmatch(r"block_(\d+)", path[0])
    if not block or path[1:] not in BLOCK:
        raise ValueError(f"diffusers' DiT has no counterpart of {'/'.join(path)}")
    return f"transformer_blocks.{block[1]}.{BLOCK[path[1:]]}"


def unstack(params, name: str = "blocks", first: int = 0):
    """Scanned layers, `name` with a leading axis, as those of an unrolled network ("block_<first>", ...); the rest as it is."""
    rest = {key: leaf for key, leaf in params.items() if key != name}
    depth = jax.tree.leaves(params[name])[0].shape[0]
    return rest | {f"block_{first + i}": jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(depth)}


def stack(params, name: str = "blocks", numbers=None):
    """Inverse of `unstack`, as NumPy arrays, of the layers `numbers` (all)."""
    if numbers is None:
        numbers = range(sum(key.startswith("block_") for key in params))
    blocks = [params[f"block_{i}"] for i in numbers]
    rest = {key: leaf for key, leaf in params.items() if key not in {f"block_{i}" for i in numbers}}
    return rest | {name: jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}


def from_torch(net: DiT, state, like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError lists missing and leftover keys, wrong shapes, and embedders that differ between blocks.
    """
    own, differ = {}, []
    for key, value in state.items():
        copy = re.fullmatch(rf"transformer_blocks\.([1-9]\d*)\.({re.escape(EMBEDDERS)}.+)", key)
        if copy is None or int(copy[1]) >= net.depth:
            own[key] = value
        elif not np.array_equal(value, state.get(f"transformer_blocks.0.{copy[2]}")):
            differ.append(key)
    if differ:
        raise ValueError(f"embedders that differ from those of block 0, which DiT shares: {sorted(differ)}")
    params = state_dict.from_torch(own, _patches(net, _unrolled(net, like), split=True), rename)
    params = _patches(net, params, split=False)
    return stack(params) if net.scan else params


def to_torch(net: DiT, params):
    """State dict of NumPy arrays of (unboxed) parameters of `net`, with block 0's embedders repeated in every block."""
    params = jax.tree.map(np.asarray, params)
    state = state_dict.to_torch(_patches(net, _unrolled(net, params), split=True), rename)
    prefix = f"transformer_blocks.0.{EMBEDDERS}"
    for key in [key for key in state if key.startswith(prefix)]:
        for i in range(1, net.depth):
            state[f"transformer_blocks.{i}.{EMBEDDERS}{key.removeprefix(prefix)}"] = state[key].copy()
    return state


def _unrolled(net: DiT, like):
    # Shapes stand for themselves without memory: a broadcast zero has a shape and can be indexed.
    zeros = jax.tree.map(lambda leaf: leaf if isinstance(leaf, np.ndarray) else np.broadcast_to(np.float32(0), leaf.shape), like)
    return unstack(zeros) if net.scan else zeros


def _patches(net: DiT, params, split: bool):
    """The patch embedding as the kernel of a convolution (patch, patch, in, width), as theirs is, or flat as ours is."""
    kernel = params["x_embed"]["kernel"]
    shape = (net.patch, net.patch, -1, net.width) if split else (-1, net.width)
    return params | {"x_embed": params["x_embed"] | {"kernel": kernel.reshape(shape)}}
