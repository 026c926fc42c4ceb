"""`flowjax.models.dit.DiT` <-> the state dicts of the papers' own code: DiT (facebookresearch/DiT) and SiT (willisma/SiT).

Both have the same modules and names. Theirs are fused (attn.qkv, rows [q; k; v]) and hold the fixed table of positions, which is
compared when read. Settings that correspond:

| DiT (adaln_zero, norm "layer", mlp "gelu")   | theirs                                                              |
|----------------------------------------------|---------------------------------------------------------------------|
| depth, heads, width, patch, mlp_ratio        | depth, num_heads, hidden_size, patch_size, mlp_ratio                |
| num_classes                                  | num_classes, with class_dropout_prob > 0 for the row of "no class"  |
| learn_sigma                                  | learn_sigma                                                         |
| frequency_shift = 0, time_scale = 1000 or 1  | always; DiT's time is the step 0..999, SiT's is in [0, 1]           |

SiT's time tau runs from noise to data, and its output is x - z. With t = 1 - tau both paths are x_t = (1 - t) x + t z, and our
velocity is z - x. So the sign is folded into the last matrix and bias, which is exact, and the network is given 1 - t by the
input scaling "reversed" (flowjax.predictions).
"""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np

from flowjax.config import ConfigError
from flowjax.interop import encoder, state_dict
from flowjax.interop.dit import stack, unstack
from flowjax.interop.fields import CLASSES, DDPM, FLOW, Fields, image, means, needs, of_classes, plain_dit, plain_input, square
from flowjax.interop.mmdit import placeholders
from flowjax.models.dit import DiT
from flowjax.models.layers import sincos_2d

TABLE = "pos_embed"
PATCH = "x_embedder.proj.weight"
TOP = {
    ("x_embed",): "x_embedder.proj",
    ("t_embed", "fc1"): "t_embedder.mlp.0",
    ("t_embed", "fc2"): "t_embedder.mlp.2",
    ("y_embed",): "y_embedder.embedding_table",
    ("final", "adaln"): "final_layer.adaLN_modulation.1",
    ("final", "linear"): "final_layer.linear",
}
BLOCK = {
    ("adaln",): "adaLN_modulation.1",
    **{("attn", x): f"attn.qkv.{x}" for x in "qkv"},  # the three parts of attn.qkv, see `_cut` and `_joined`
    ("attn", "out"): "attn.proj",
    ("mlp", "fc1"): "mlp.fc1",
    ("mlp", "fc2"): "mlp.fc2",
}


def rename(path: tuple[str, ...]) -> str:
    """Our module path, layers not stacked, as the papers' code names it; ValueError where it has no such module."""
    if path in TOP:
        return TOP[path]
    block = re.fullmatch(r"block_(\d+)", path[0])
    if not block or path[1:] not in BLOCK:
        raise ValueError(f"the papers' DiT has no counterpart of {'/'.join(path)}")
    return f"blocks.{block[1]}.{BLOCK[path[1:]]}"


def from_torch(net: DiT, state: Mapping[str, np.ndarray], like):
    """Parameters for `net` from a DiT's state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError lists missing and leftover keys and wrong shapes, and says where the table of positions is another than ours.
    """
    state = dict(state)
    if TABLE in state:
        given = np.asarray(state.pop(TABLE), np.float32)
        side = math.isqrt(given.shape[-2])
        if side**2 != given.shape[-2] or not np.allclose(given, table(net, side), atol=4e-3):  # bfloat16 is as near as that
            raise ValueError(f"{TABLE} is not the fixed sin-cos table of a square image")
    if PATCH in state:
        state[PATCH] = encoder.flatten_patches(state[PATCH])
    like = placeholders(like)
    params = state_dict.from_torch(_cut(state), unstack(like) if net.scan else like, rename)
    return stack(params) if net.scan else params


def to_torch(net: DiT, params) -> dict[str, np.ndarray]:
    """State dict of NumPy arrays of (unboxed) parameters of `net`, without the table of positions: the inverse of `from_torch`."""
    params = jax.tree.map(np.asarray, params)
    state = _joined(state_dict.to_torch(unstack(params) if net.scan else params, rename))
    state[PATCH] = encoder.unflatten_patches(state[PATCH], net.patch)
    return state


def table(net: DiT, side: int) -> np.ndarray:
    """Their buffer of positions (1, side * side, width), for an image of side x side patches."""
    return sincos_2d(net.width, side, side).astype(np.float32)[None]


def from_torch_sit(net: DiT, state: Mapping[str, np.ndarray], like):
    """`from_torch` for a SiT's state dict: the network predicts z - x."""
    return _negated(from_torch(net, state, like))


def to_torch_sit(net: DiT, params) -> dict[str, np.ndarray]:
    """Inverse of `from_torch_sit`."""
    return to_torch(net, _negated(params))


def _negated(params):
    linear = jax.tree.map(lambda leaf: -np.asarray(leaf), params["final"]["linear"])
    return {**params, "final": {**params["final"], "linear": linear}}


def _cut(state):
    """The state dict with every attn.qkv in its three parts."""
    out = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            parts = zip("qkv", np.split(value, 3), strict=True)
            out |= {key.replace(".qkv.", f".qkv.{x}."): part for x, part in parts}
        else:
            out[key] = value
    return out


def _joined(state):
    """Inverse of `_cut`."""
    out = {}
    for key, value in state.items():
        if ".attn.qkv.q." in key:
            parts = [state[key.replace(".qkv.q.", f".qkv.{x}.")] for x in "qkv"]
            out[key.replace(".qkv.q.", ".qkv.")] = np.concatenate(parts)
        elif ".attn.qkv." not in key:
            out[key] = value
    return out


def read_dit(c: Fields) -> dict:
    """The arguments of the class DiT of the paper's code."""
    return _read(c, 1000.0) | DDPM | {"sample": {"sampler": "ddim", **CLASSES}}


def read_sit(c: Fields) -> dict:
    """The arguments of the class SiT of the paper's code."""
    meaning = FLOW | {"input_scaling": {"name": "reversed"}}
    return _read(c, 1.0) | meaning | {"sample": {"sampler": "heun", **CLASSES}}


def _read(c, time_scale):
    if not c.take("class_dropout_prob", 0.1):
        raise ConfigError(f"{c.where}: class_dropout_prob = 0 is not supported: the label table then has no row for 'no class'")
    model = {
        "name": "dit", "depth": c.take("depth", 28), "width": c.take("hidden_size", 1152), "heads": c.take("num_heads", 16),
        "patch": c.take("patch_size", 2), "num_classes": c.take("num_classes", 1000), "mlp_ratio": c.take("mlp_ratio", 4.0),
        "learn_sigma": c.take("learn_sigma", True), "time_scale": time_scale,
    }  # fmt: skip
    return of_classes(model, image(c.take("input_size", 32), c.take("in_channels", 4)))


def write_dit(net, info) -> dict:
    """The arguments of the paper's DiT."""
    plain_input(info, "the paper's DiT")
    return _write(net, info, "the paper's DiT", 1000.0)


def write_sit(net, info) -> dict:
    """The arguments of the paper's SiT; only of a network that gets its time as a SiT does, which an imported one is."""
    means(info, "the paper's SiT", **FLOW | {"input_scaling": {"name": "reversed"}})
    return _write(net, info, "the paper's SiT", 1.0)


def _write(net, info, library, time_scale):
    plain_dit(net, library)
    needs(net, library, frequency_shift=0.0, time_scale=time_scale, out_channels=0)
    return {
        "input_size": square(info, library), "patch_size": net.patch, "in_channels": info["shape"][-1], "hidden_size": net.width,
        "depth": net.depth, "num_heads": net.heads, "mlp_ratio": net.mlp_ratio, "class_dropout_prob": 0.1,
        "num_classes": net.num_classes, "learn_sigma": net.learn_sigma,
    }  # fmt: skip
