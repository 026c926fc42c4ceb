"""`flowjax.models.mmdit.MMDiT` <-> the state dict of diffusers' `SD3Transformer2DModel`. Settings that correspond:

| MMDiT                                     | SD3Transformer2DModel                                               |
|-------------------------------------------|---------------------------------------------------------------------|
| depth, heads, width / heads, patch         | num_layers, num_attention_heads, attention_head_dim, patch_size     |
| sizes of cond["text"], cond["pooled"]      | joint_attention_dim, pooled_projection_dim                          |
| width                                      | caption_projection_dim                                              |
| qk_norm                                    | qk_norm = "rms_norm"                                                |
| dual = n                                   | dual_attention_layers = (0, ..., n - 1)                             |
| table, base                                | pos_embed_max_size, sample_size / patch_size                        |
| time_scale * t                             | timestep                                                            |

Where two vectors of a modulation are all there is (the last norm, the last block's norm of the text) theirs are
(scale, shift), ours (shift, scale) as in every other place. The table of positions is a buffer of theirs: positions = "table"
keeps it as it is, positions = "cropped" has the one that diffusers computes and refuses any other.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from flowjax.interop import state_dict
from flowjax.interop.dit import stack, unstack
from flowjax.models.mmdit import MMDiT, grid_sincos

TABLE = "pos_embed.pos_embed"
TOP = {
    ("x_embed",): "pos_embed.proj",
    ("positions",): "pos_embed.table",  # has no such name there: a buffer, (1, places, width)
    ("t_embed", "fc1"): "time_text_embed.timestep_embedder.linear_1",
    ("t_embed", "fc2"): "time_text_embed.timestep_embedder.linear_2",
    ("pooled_embed", "fc1"): "time_text_embed.text_embedder.linear_1",
    ("pooled_embed", "fc2"): "time_text_embed.text_embedder.linear_2",
    ("text_embed",): "context_embedder",
    ("final", "adaln"): "norm_out.linear",
    ("final", "linear"): "proj_out",
}
BLOCK = {
    ("image_adaln",): "norm1.linear",
    ("text_adaln",): "norm1_context.linear",
    **{("attn", f"image_{x}"): f"attn.to_{x}" for x in "qkv"},
    **{("attn", f"text_{x}"): f"attn.add_{x}_proj" for x in "qkv"},
    **{("attn", f"image_{x}_norm"): f"attn.norm_{x}" for x in "qk"},
    **{("attn", f"text_{x}_norm"): f"attn.norm_added_{x}" for x in "qk"},
    ("attn", "image_out"): "attn.to_out.0",
    ("attn", "text_out"): "attn.to_add_out",
    ("image_mlp", "fc1"): "ff.net.0.proj",
    ("image_mlp", "fc2"): "ff.net.2",
    ("text_mlp", "fc1"): "ff_context.net.0.proj",
    ("text_mlp", "fc2"): "ff_context.net.2",
    **{("second_attn", x): f"attn2.to_{x}" for x in "qkv"},
    **{("second_attn", f"{x}_norm"): f"attn2.norm_{x}" for x in "qk"},
    ("second_attn", "out"): "attn2.to_out.0",
}


def rename(path: tuple[str, ...]) -> str:
    """Our module path, layers not stacked, as diffusers names it; ValueError where it has no such module."""
    if path in TOP:
        return TOP[path]
    block = re.fullmatch(r"block_(\d+)", path[0])
    if not block or path[1:] not in BLOCK:
        raise ValueError(f"diffusers' SD3 has no counterpart of {'/'.join(path)}")
    return f"transformer_blocks.{block[1]}.{BLOCK[path[1:]]}"


def from_torch(net: MMDiT, state: Mapping[str, np.ndarray], like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError lists missing and leftover keys and wrong shapes, and says where the table of positions is another than ours.
    """
    _check(net)
    state, table = dict(state), _table(net)
    if net.positions == "table":
        if TABLE in state:
            state[f"{TOP['positions',]}.weight"] = state.pop(TABLE).reshape(-1, net.width)
    elif TABLE in state:
        given = np.asarray(state.pop(TABLE))
        if given.shape != table.shape or not np.allclose(given, table, atol=1e-3):  # float16 is as near as that
            raise ValueError(f"{TABLE} is not the sin-cos table of model.table = {net.table} and model.base = {net.base};"
                             " model.positions = 'table' takes any")  # fmt: skip
    like = _patches(net, unrolled(net, placeholders(like)), split=True)
    params = state_dict.from_torch(swapped(state, swaps(net)), like, rename)
    return scanned(net, _patches(net, params, split=False))


def to_torch(net: MMDiT, params) -> dict[str, np.ndarray]:
    """State dict of NumPy arrays of (unboxed) parameters of `net`: the inverse of `from_torch`."""
    _check(net)
    params = _patches(net, unrolled(net, jax.tree.map(np.asarray, params)), split=True)
    state = swapped(state_dict.to_torch(params, rename), swaps(net))
    held = state.pop(f"{TOP['positions',]}.weight", None)
    return state | {TABLE: _table(net) if held is None else held[None]}


def placeholders(like):
    """Shapes as arrays that take no memory (a broadcast zero has a shape and can be indexed); arrays as they are."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, np.ndarray) else np.broadcast_to(np.float32(0), leaf.shape), like)


def swapped(state, keys):
    """The state dict with the two halves of the rows of `keys` exchanged: (scale, shift) <-> (shift, scale)."""
    return {k: np.concatenate(np.split(v, 2)[::-1]) if k in keys else v for k, v in state.items()}


def unrolled(net: MMDiT, params):
    """Parameters with every layer by itself."""
    for name, numbers in groups(net).items():
        params = unstack(params, name, numbers[0])
    return params


def scanned(net: MMDiT, params):
    """Inverse of `unrolled`."""
    for name, numbers in groups(net).items():
        params = stack(params, name, numbers)
    return params


def groups(net: MMDiT) -> dict[str, range]:
    """Stacked parameter -> the layers in it."""
    kinds = {"dual_blocks": range(net.dual), "blocks": range(net.dual, net.depth - 1)}
    return {name: numbers for name, numbers in kinds.items() if numbers and net.scan}


def swaps(net):
    """Keys whose two halves are the other way round there."""
    modules = "norm_out.linear", f"transformer_blocks.{net.depth - 1}.norm1_context.linear"
    return {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


def _check(net):
    if net.positions == "rope":
        raise ValueError("diffusers' SD3 has a table of positions; model.positions = 'rope' cannot be expressed in it")


def _table(net):
    steps = net.base / net.table * np.arange(net.table)
    return np.asarray(grid_sincos(net.width, steps, steps))[None]


def _patches(net, params, split: bool):
    """The patch embedding as the kernel of a convolution (patch, patch, in, width), as theirs is, or flat as ours is."""
    kernel = params["x_embed"]["kernel"]
    shape = (net.patch, net.patch, -1, net.width) if split else (-1, net.width)
    return params | {"x_embed": params["x_embed"] | {"kernel": kernel.reshape(shape)}}
