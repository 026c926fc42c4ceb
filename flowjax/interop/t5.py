"""`flowjax.models.t5.T5Encoder` <-> the state dict of transformers' `T5EncoderModel` or `UMT5EncoderModel`.

| T5Encoder                             | T5Config (feed_forward_proj "gated-gelu")                        |
|---------------------------------------|------------------------------------------------------------------|
| width, head_dim, hidden, depth, heads | d_model, d_kv, d_ff, num_layers, num_heads                       |
| vocab, buckets, distance              | vocab_size, relative_attention_num_buckets, .._max_distance      |
| shared_bias                           | True: T5, whose first layer owns the table; False: UMT5          |
| mask_padding                          | attention_mask = input_ids != 0                                  |

The token table is there twice, as `shared` and as the encoder's: they must agree when read (files may have one of them), and
both are written. A decoder is left out.
"""

import numpy as np

from flowjax.interop import encoder
from flowjax.models.t5 import T5Encoder

SHARED, TOKENS = "shared.weight", "encoder.embed_tokens.weight"
TOP = {
    ("token_embed",): "encoder.embed_tokens",
    ("bias", "table"): "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ("norm",): "encoder.final_layer_norm",
}
BLOCK = {
    ("attn_norm",): "layer.0.layer_norm",
    ("q",): "layer.0.SelfAttention.q",
    ("k",): "layer.0.SelfAttention.k",
    ("v",): "layer.0.SelfAttention.v",
    ("out",): "layer.0.SelfAttention.o",
    ("bias", "table"): "layer.0.SelfAttention.relative_attention_bias",
    ("mlp_norm",): "layer.1.layer_norm",
    ("w1",): "layer.1.DenseReluDense.wi_0",
    ("w2",): "layer.1.DenseReluDense.wi_1",
    ("w3",): "layer.1.DenseReluDense.wo",
}


def rename(path: tuple[str, ...]) -> str:
    """Our module path, layers not stacked, as transformers names it."""
    return TOP[path] if path in TOP else f"encoder.block.{path[0].removeprefix('block_')}.{BLOCK[path[1:]]}"


def from_torch(net: T5Encoder, state, like):
    """Parameters for `net` from a state dict of NumPy arrays; `like` is its (unboxed) parameter tree, arrays or shapes.

    ValueError lists missing and leftover keys and wrong shapes, and token tables that differ.
    """
    del net
    state = {key: value for key, value in state.items() if not key.startswith(("decoder.", "lm_head."))}
    shared = state.pop(SHARED, None)
    if shared is not None and not np.array_equal(state.setdefault(TOKENS, shared), shared):
        raise ValueError(f"{SHARED} and {TOKENS} differ; they should be one table")
    return encoder.from_torch(state, like, rename)


def to_torch(net: T5Encoder, params):
    """State dict of NumPy arrays of (unboxed) parameters of `net`: the inverse of `from_torch`."""
    del net
    state = encoder.to_torch(params, rename)
    return {SHARED: state[TOKENS].copy(), **state}
