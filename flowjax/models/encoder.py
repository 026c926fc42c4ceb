"""The pre-norm transformer that encoders of text and images share (ViT, DINOv2, CLIP, our own text encoder).

    x <- x + s1 Attention(LayerNorm(x));   x <- x + s2 MLP(LayerNorm(x))         (s1, s2 = 1 without layerscale)

Layers are stacked on a leading "layers" axis and scanned.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flowjax.config import ConfigError, lookup
from flowjax.models import layers as L
from flowjax.models.dit import Attention
from flowjax.models.remat import BLOCK, REMAT
from flowjax.models.sharding import constrain
from flowjax.models.stack import stack

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's weights of OpenAI were trained with it
}
MLPS = (*ACTIVATIONS, "swiglu")


class Scale(nn.Module):
    """x times a learned vector that starts at `init` (LayerScale, 2103.17239)."""

    init: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.init), ("norm",))
        return x * self.param("scale", init, x.shape[-1:], jnp.float32)


class Block(nn.Module):
    """One layer; x (B, N, D) in the compute dtype."""

    heads: int
    hidden: int
    mlp: str
    eps: float
    layerscale: float
    implementation: str
    dtype: str

    @nn.compact
    def __call__(self, x, mask):
        x = checkpoint_name(x, BLOCK)

        def branch(x, name, layer, **inputs):
            h = layer(L.LayerNorm(self.eps, True, self.dtype, name=f"{name}_norm")(x), **inputs)
            if self.layerscale:
                h = Scale(self.layerscale, name=f"{name}_scale")(h)
            return constrain((x + h).astype(self.dtype), "batch", "seq", "act")

        x = branch(x, "attn", Attention(self.heads, False, self.implementation, self.dtype, name="attn"), mask=mask)
        if self.mlp == "swiglu":
            return branch(x, "mlp", L.SwiGLU(self.hidden, self.dtype, name="mlp")), None
        return branch(x, "mlp", L.GeluMLP(self.hidden, self.dtype, ACTIVATIONS[self.mlp], name="mlp")), None


def transformer(
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    depth: int,
    heads: int,
    hidden: int,
    mlp: str = "gelu",
    eps: float = 1e-5,
    layerscale: float = 0.0,
    dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
    tap: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """State after `depth` blocks over x (B, N, D), and after `tap` of them (None for 0), without the norm that follows.

    Called in the compact method of a network, whose parameter "blocks" then holds the layers. layerscale is the start of the
    learned scale of each branch, 0 for none.
    """
    lookup(dict.fromkeys(MLPS), mlp, "model.mlp")
    lookup(REMAT, remat, "model.remat")
    if x.shape[-1] % heads:
        raise ConfigError(f"model.heads = {heads} does not divide model.width = {x.shape[-1]}")
    x = constrain(x.astype(dtype), "batch", "seq", "act")
    fields = heads, hidden, mlp, eps, layerscale, attention, dtype
    x, kept = stack(Block, fields, depth, remat=remat, taps=(tap,))(x, mask)
    return x, kept.get(tap)


def causal(length: int) -> jax.Array:
    """Mask (1, 1, length, length): a token sees itself and those before it."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))
