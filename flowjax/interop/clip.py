"""`flowjax.models.clip` <-> state dicts of transformers.

| ours                      | theirs                                                       |
|---------------------------|--------------------------------------------------------------|
| CLIPText, features 0      | `CLIPTextModel`                                              |
| CLIPText with features    | `CLIPTextModelWithProjection` (projection_dim)                |
| CLIPVision, features 0    | `CLIPVisionModel`                                            |
| CLIPVision with features  | `CLIPVisionModelWithProjection` (projection_dim)              |
| CLIP                      | `CLIPModel` (projection_dim)                                  |
| mlp "quick_gelu", "gelu"  | hidden_act "quick_gelu", "gelu"                              |
| eos                       | eos_token_id                                                 |
| grid                      | image_size / patch_size                                      |

A tower is also read from the state dict of both, and with the prefix that files have which were saved before transformers 5.
"""

import re

import numpy as np

from flowjax.interop import encoder
from flowjax.models.clip import CLIP, CLIPText, CLIPVision

PATCH = "embeddings.patch_embedding.weight"
CLASS = "embeddings.class_embedding"
PREFIX = {"text": "text_model", "image": "vision_model"}
PROJECTION = {"text": "text_projection", "image": "visual_projection"}
TEXT = {
    ("token_embed",): "embeddings.token_embedding",
    ("position_embed",): "embeddings.position_embedding",
    ("norm",): "final_layer_norm",
}
IMAGE = {
    ("embed", "patch"): "embeddings.patch_embedding",
    ("embed", "class"): CLASS,
    ("embed", "positions"): "embeddings.position_embedding",
    ("pre_norm",): "pre_layrnorm",
    ("norm",): "post_layernorm",
}
BLOCK = {
    ("attn_norm",): "layer_norm1",
    ("attn", "q"): "self_attn.q_proj",
    ("attn", "k"): "self_attn.k_proj",
    ("attn", "v"): "self_attn.v_proj",
    ("attn", "out"): "self_attn.out_proj",
    ("mlp_norm",): "layer_norm2",
    ("mlp", "fc1"): "mlp.fc1",
    ("mlp", "fc2"): "mlp.fc2",
}


def _which(net) -> str:
    return "text" if isinstance(net, CLIPText) else "image"


def _rename(which: str):
    top = {**(TEXT if which == "text" else IMAGE), ("projection",): PROJECTION[which]}

    def one(path: tuple[str, ...]) -> str:
        return top[path] if path in top else f"encoder.layers.{path[0].removeprefix('block_')}.{BLOCK[path[1:]]}"

    return one


def from_torch(net: CLIP | CLIPText | CLIPVision, state, like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError lists missing and leftover keys and wrong shapes.
    """
    state = {key: np.asarray(value) for key, value in state.items() if not key.endswith("position_ids")}
    if isinstance(net, CLIP):
        if "logit_scale" not in state:
            raise ValueError("state dict does not fit: missing ['logit_scale']")
        towers = {f"{which}_encoder": from_torch(net.tower(which), state, like[f"{which}_encoder"]) for which in PREFIX}
        return towers | {"log_scale": state["logit_scale"]}
    which = _which(net)
    other = "image" if which == "text" else "text"
    foreign = re.compile(rf"({PREFIX[other]}|{PROJECTION[other]})\.|logit_scale$")
    state = encoder.renamed({key: value for key, value in state.items() if not foreign.match(key)}, [(rf"^{PREFIX[which]}\.", "")])
    if PATCH in state:
        state[PATCH] = encoder.flatten_patches(state[PATCH])
    if CLASS in state:
        state[f"{CLASS}.weight"] = state.pop(CLASS)[None]
    return encoder.from_torch(state, like, _rename(which))


def to_torch(net: CLIP | CLIPText | CLIPVision, params):
    """State dict of NumPy arrays of (unboxed) parameters of `net`: the inverse of `from_torch`, in the names of transformers 5."""
    if isinstance(net, CLIP):
        towers = [to_torch(net.tower(which), params[f"{which}_encoder"]) for which in PREFIX]
        return towers[0] | towers[1] | {"logit_scale": np.asarray(params["log_scale"])}
    which = _which(net)
    state = encoder.to_torch(params, _rename(which))
    if PATCH in state:
        state[PATCH] = encoder.unflatten_patches(state[PATCH], net.patch)
        state[CLASS] = state.pop(f"{CLASS}.weight")[0]
    if not net.features:
        return state
    return {key if key.startswith(PROJECTION[which]) else f"{PREFIX[which]}.{key}": value for key, value in state.items()}
