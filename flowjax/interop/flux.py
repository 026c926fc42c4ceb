"""`flowjax.models.flux.Flux` <-> the state dict of diffusers' `FluxTransformer2DModel`. Settings that correspond:

| Flux                                   | FluxTransformer2DModel                                  |
|-----------------------------------------|---------------------------------------------------------|
| depth, single_depth                     | num_layers, num_single_layers                           |
| heads, width / heads, rope_axes         | num_attention_heads, attention_head_dim, axes_dims_rope |
| sizes of cond["text"], cond["pooled"]   | joint_attention_dim, pooled_projection_dim              |
| channels of x times 4                   | in_channels: latents are packed by their pipeline       |
| guidance_embed                          | guidance_embeds                                         |
| t, cond["guidance"]                     | timestep, guidance: they multiply by 1000 as well       |

Their last modulation is (scale, shift), ours (shift, scale). Their output matrix of a single block reads attention and MLP
together, ours are two: its columns are cut at `width`.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from flowjax.interop import mmdit, state_dict
from flowjax.interop.dit import stack, unstack
from flowjax.interop.mmdit import placeholders, swapped
from flowjax.models.flux import Flux

SWAPPED = {"norm_out.linear.weight", "norm_out.linear.bias"}
TOP = {path: name for path, name in mmdit.TOP.items() if path != ("positions",)} | {
    ("x_embed",): "x_embedder",
    ("g_embed", "fc1"): "time_text_embed.guidance_embedder.linear_1",
    ("g_embed", "fc2"): "time_text_embed.guidance_embedder.linear_2",
}
DOUBLE = {path: name for path, name in mmdit.BLOCK.items() if path[0] != "second_attn"}
SINGLE = {
    ("adaln",): "norm.linear",
    **{(x,): f"attn.to_{x}" for x in "qkv"},
    **{(f"{x}_norm",): f"attn.norm_{x}" for x in "qk"},
    ("fc1",): "proj_mlp",
    ("out",): "proj_out.attn",  # the two parts of proj_out, see `_cut` and `_joined`
    ("fc2",): "proj_out.mlp",
}


def from_torch(net: Flux, state: Mapping[str, np.ndarray], like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError lists missing and leftover keys and wrong shapes.
    """
    params = state_dict.from_torch(swapped(_cut(net, state), SWAPPED), _unrolled(net, placeholders(like)), rename(net))
    for name, numbers in groups(net).items():
        params = stack(params, name, numbers)
    return params


def to_torch(net: Flux, params) -> dict[str, np.ndarray]:
    """State dict of NumPy arrays of (unboxed) parameters of `net`: the inverse of `from_torch`."""
    params = _unrolled(net, jax.tree.map(np.asarray, params))
    return _joined(swapped(state_dict.to_torch(params, rename(net)), SWAPPED))


def rename(net: Flux):
    """The renaming of module paths, layers not stacked, that `flowjax.interop.state_dict` takes."""

    def one(path):
        if path in TOP:
            return TOP[path]
        if block := re.fullmatch(r"block_(\d+)", path[0]):
            number, inner = int(block[1]), path[1:]
            if number < net.depth and inner in DOUBLE:
                return f"transformer_blocks.{number}.{DOUBLE[inner]}"
            if number >= net.depth and inner in SINGLE:
                return f"single_transformer_blocks.{number - net.depth}.{SINGLE[inner]}"
        raise ValueError(f"diffusers' FLUX has no counterpart of {'/'.join(path)}")

    return one


def groups(net: Flux) -> dict[str, range]:
    """Stacked parameter -> the layers in it."""
    kinds = {"double_blocks": range(net.depth), "single_blocks": range(net.depth, net.depth + net.single_depth)}
    return kinds if net.scan else {}


def _unrolled(net, params):
    for name, numbers in groups(net).items():
        params = unstack(params, name, numbers[0])
    return params


def _cut(net, state):
    """The state dict with every proj_out of a single block in its two parts; the bias goes with the attention."""
    out = {}
    for key, value in state.items():
        single = re.fullmatch(r"(single_transformer_blocks\.\d+\.proj_out)\.(weight|bias)", key)
        if single is None:
            out[key] = value
        elif single[2] == "bias":
            out[f"{single[1]}.attn.bias"] = value
        else:
            out[f"{single[1]}.attn.weight"], out[f"{single[1]}.mlp.weight"] = np.split(value, [net.width], axis=1)
    return out


def _joined(state):
    """Inverse of `_cut`."""
    out = {}
    for key, value in state.items():
        if key.endswith(".proj_out.attn.weight"):
            whole = np.concatenate([value, state[key.replace(".attn.", ".mlp.")]], axis=1)
            out[key.replace(".proj_out.attn.", ".proj_out.")] = whole
        elif not key.endswith(".proj_out.mlp.weight"):
            out[key.replace(".proj_out.attn.", ".proj_out.")] = value
    return out
