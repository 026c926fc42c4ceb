"""`flowjax.models.vit.ViT` <-> state dicts of transformers: `ViTModel`, `ViTMAEModel`, `Dinov2Model`, `Dinov2WithRegistersModel`.

A network with layerscale is read and written as a DINOv2, one without as a ViT. Reading also takes the names that files carry
which were saved before transformers 5, a "vit." or "dinov2." in front of all of them, and leaves out heads, poolers and MAE's
decoder, which are no part of an encoder. Settings that correspond:

| ViT                                      | theirs                                                                  |
|------------------------------------------|-------------------------------------------------------------------------|
| width, depth, heads, patch               | hidden_size, num_hidden_layers, num_attention_heads, patch_size          |
| grid                                     | image_size / patch_size                                                 |
| eps                                      | layer_norm_eps, 1e-12 by default in ViT and MAE                          |
| positions "sincos"                       | MAE's; the stored table is compared and not read                         |
| registers, antialias                     | num_register_tokens; always in Dinov2WithRegisters and nowhere else      |
| mlp "swiglu"                             | use_swiglu_ffn                                                          |
| mean, std                                | what the image processor does                                           |
"""

import re

import numpy as np

from flowjax.interop import encoder
from flowjax.models.layers import sincos_2d
from flowjax.models.vit import ViT

PATCH = "embeddings.patch_embeddings.projection.weight"
POSITIONS = "embeddings.position_embeddings"
MASK = "embeddings.mask_token"
# Tensors of their own, not a module's weight, with a leading axis of size one that ours have not.
BARE = ("embeddings.cls_token", "embeddings.register_tokens", MASK, POSITIONS)
TOP = {
    ("embed", "patch"): "embeddings.patch_embeddings.projection",
    ("embed", "class"): "embeddings.cls_token",
    ("embed", "registers"): "embeddings.register_tokens",
    ("embed", "mask"): MASK,
    ("embed", "positions"): POSITIONS,
    ("norm",): "layernorm",
}
BLOCK = {
    ("attn", "q"): "attention.q_proj",
    ("attn", "k"): "attention.k_proj",
    ("attn", "v"): "attention.v_proj",
    ("attn", "out"): "attention.o_proj",
    ("mlp", "fc1"): "mlp.fc1",
    ("mlp", "fc2"): "mlp.fc2",
    ("mlp", "w1"): "mlp.gate_proj",
    ("mlp", "w2"): "mlp.up_proj",
    ("mlp", "w3"): "mlp.down_proj",
}
VIT = {("attn_norm",): "layernorm_before", ("mlp_norm",): "layernorm_after"}
DINO = {("attn_norm",): "norm1", ("mlp_norm",): "norm2", ("attn_scale",): "layer_scale1.lambda1", ("mlp_scale",): "layer_scale2.lambda1"}
OLD = (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)
HEADS = re.compile(r"(pooler|classifier|decoder)\.")


def rename(net: ViT):
    """The function from our module path to the module's name in transformers."""
    blocks, table = ("encoder.layer", BLOCK | DINO) if net.layerscale else ("layers", BLOCK | VIT)

    def one(path: tuple[str, ...]) -> str:
        return TOP[path] if path in TOP else f"{blocks}.{path[0].removeprefix('block_')}.{table[path[1:]]}"

    return one


def from_torch(net: ViT, state, like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError lists missing and leftover keys and wrong shapes.
    """
    state = encoder.renamed({key: value for key, value in state.items() if not HEADS.match(key)}, OLD)
    if not net.layerscale:
        state = encoder.renamed(state, [(r"^encoder\.layer\.", "layers.")])
    for key in [key for key in state if ".mlp.weights_in." in key]:
        halves = np.split(state.pop(key), 2)
        state |= {key.replace("weights_in", name): half for name, half in zip(("gate_proj", "up_proj"), halves)}
    if PATCH in state:
        state[PATCH] = encoder.flatten_patches(state[PATCH])
    if net.positions == "sincos" and POSITIONS in state:
        if not np.allclose(state.pop(POSITIONS)[0, 1:], sincos_2d(net.width, net.grid, net.grid), atol=1e-5):
            raise ValueError(f"{POSITIONS} is not the fixed table of model.positions = 'sincos'")
    for key in BARE:
        if key in state:
            value = np.asarray(state.pop(key))
            state[f"{key}.weight"] = value.reshape(value.shape[-2:])  # DINOv2's mask token lacks the leading axis
    state = {f"{key}.weight" if key.endswith("lambda1") else key: value for key, value in state.items()}
    return encoder.from_torch(state, like, rename(net))


def to_torch(net: ViT, params):
    """State dict of NumPy arrays of (unboxed) parameters of `net`: the inverse of `from_torch`, in the names of transformers 5."""
    state = encoder.to_torch(params, rename(net))
    state[PATCH] = encoder.unflatten_patches(state[PATCH], net.patch)
    state = {key.replace("lambda1.weight", "lambda1"): value for key, value in state.items()}
    for key in BARE:
        if f"{key}.weight" in state:
            value = state.pop(f"{key}.weight")
            state[key] = value if key == MASK and net.layerscale else value[None]
    if net.positions == "sincos":
        table = sincos_2d(net.width, net.grid, net.grid).astype(np.float32)
        state[POSITIONS] = np.concatenate([np.zeros((1, net.width), np.float32), table])[None]
    return state
