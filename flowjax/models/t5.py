"""The encoders of T5 v1.1 (1910.10683, 2002.05202), UMT5 (2304.09151) and ByT5 (2105.13626)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from flowjax.config import lookup
from flowjax.models import layers as L
from flowjax.models.remat import ATTENTION, BLOCK, REMAT
from flowjax.models.sharding import constrain
from flowjax.models.stack import stack
from flowjax.models.text import PADDING, masked_mean

EPS = 1e-6


def relative_buckets(length: int, buckets: int = 32, distance: int = 128) -> np.ndarray:
    """Bucket (length, length) of key - query: half of the buckets for keys to the right; in each half, one for each of the
    nearest places and logarithmically growing ones from there to `distance`, which the last also takes beyond."""
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    # In single precision and in this order, as the weights were trained with.
    far = np.log(np.maximum(np.abs(offset), 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(distance / exact))
    far = np.minimum(exact + (far * np.float32(half - exact)).astype(int), half - 1)
    return half * (offset > 0) + np.where(np.abs(offset) < exact, np.abs(offset), far)


class RelativeBias(nn.Module):
    """Learned logit (1, heads, length, length) of each bucket."""

    heads: int
    buckets: int
    distance: int

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        table = L.Embed(self.buckets, self.heads, ("small", "heads"), name="table")
        return rearrange(table(relative_buckets(length, self.buckets, self.distance)), "t s h -> 1 h t s")


class Block(nn.Module):
    """One layer; x (B, N, D) in the compute dtype, bias (1, heads, N, N) or None where the layer has its own, mask (B, 1, 1, N)."""

    heads: int
    head_dim: int
    hidden: int
    buckets: int
    distance: int
    dtype: str

    @nn.compact
    def __call__(self, x, bias, mask):
        x = checkpoint_name(x, BLOCK)

        def linear(features, axes, name):
            return L.Linear(features, axes, bias=False, dtype=self.dtype, name=name)

        def project(h, name):
            y = linear(self.heads * self.head_dim, ("embed", "heads"), name)(h)
            return constrain(rearrange(y, "b n (h d) -> b n h d", h=self.heads), "batch", "seq", "act_heads", None)

        if bias is None:
            bias = RelativeBias(self.heads, self.buckets, self.distance, name="bias")(x.shape[1])
        h = L.RMSNorm(EPS, self.dtype, name="attn_norm")(x)
        q, k, v = (project(h, name) for name in "qkv")
        exact = jnp.promote_types(q.dtype, jnp.float32)
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=exact) + bias  # no division by sqrt(head_dim)
        logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(exact).min)
        h = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)
        h = checkpoint_name(rearrange(h, "b n h d -> b n (h d)"), ATTENTION)
        h = constrain(linear(x.shape[-1], ("heads", "embed"), "out")(h), "batch", "seq", "act")
        x = constrain(x + h, "batch", "seq", "act")

        h = L.RMSNorm(EPS, self.dtype, name="mlp_norm")(x)
        gate, value = (constrain(linear(self.hidden, ("embed", "mlp"), name)(h), "batch", "seq", "act_mlp") for name in ("w1", "w2"))
        h = linear(x.shape[-1], ("mlp", "embed"), "w3")(nn.gelu(gate, approximate=True) * value)
        return constrain(x + constrain(h, "batch", "seq", "act"), "batch", "seq", "act"), None


class T5Encoder(nn.Module):
    """Pre-norm blocks (RMS norm, no biases, gated GELU) whose attention knows places by learned offsets of its logits.

    Padding is token 0. It is read like any other token (as SD3 and FLUX do, with prompts of one length) unless mask_padding, where
    no token looks at it: then the states of the other tokens do not depend on how much of it there is. Its own states are
    returned either way. T5 has no pooled vector; ours is the mean of the states that are not padding's, or of all where there
    are none, and then mask_padding masks nothing.

    Fields:
      width, depth, heads, head_dim, hidden, vocab: sizes; heads * head_dim may differ from width.
      buckets, distance: of relative positions.   shared_bias: one table for all layers (T5), or one for each (UMT5).
      dtype, remat: see `flowjax.models.dit.DiT`; float16 overflows in the largest model, bfloat16 does not.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    head_dim: int = 64
    vocab: int = 32128
    buckets: int = 32
    distance: int = 128
    shared_bias: bool = True
    mask_padding: bool = False
    dtype: str = "float32"
    remat: str = "none"

    kind = "text_encoder"
    presets = {
        f"v1.1-{name}": dict(zip(("width", "hidden", "depth", "heads"), sizes))
        for name, sizes in {
            "small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32),
            "xxl": (4096, 10240, 24, 64),
        }.items()
    }  # fmt: skip
    presets |= {
        "umt5-xxl": {**presets["v1.1-xxl"], "vocab": 256384, "shared_bias": False},
        "byt5-small": {"width": 1472, "hidden": 3584, "depth": 12, "heads": 6, "vocab": 384},
    }

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sequence (B, L, width), pooled (B, width)), float32, of token ids (B, L)."""
        lookup(REMAT, self.remat, "model.remat")
        kept, mask = tokens != PADDING, None
        if self.mask_padding:
            mask = (kept | ~jnp.any(kept, axis=1, keepdims=True))[:, None, None]
        h = L.Embed(self.vocab, self.width, init=L.normal(1.0), name="token_embed")(tokens)
        h = constrain(h.astype(self.dtype), "batch", "seq", "act")
        bias = RelativeBias(self.heads, self.buckets, self.distance, name="bias")(tokens.shape[1]) if self.shared_bias else None
        fields = self.heads, self.head_dim, self.hidden, self.buckets, self.distance, self.dtype
        h, _ = stack(Block, fields, self.depth, remat=self.remat)(h, bias, mask)
        sequence = constrain(L.RMSNorm(EPS, name="norm")(h), "batch", "seq", "act")
        return sequence, constrain(masked_mean(sequence, kept), "batch", "act")
