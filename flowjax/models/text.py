"""A small text encoder that is trained here, with the network that it serves or contrastively (`two_tower`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, check
from flowjax.models import layers as L
from flowjax.models.encoder import causal, transformer
from flowjax.models.sharding import constrain

PADDING = 0


class TextTransformer(nn.Module):
    """Token and learned position embeddings, `depth` pre-norm blocks, a final norm.

    Padding is token 0. A prompt always has `length` tokens and its padding is read like any other token, at whatever place
    it stands (the network learns what an end looks like, and the empty prompt has an embedding of its own); the pooled
    vector alone leaves padding out: it is the mean of the states of the other tokens, or of all of them where there are none.

    Fields:
      vocab, length: rows of the two tables; a prompt of another length is refused.
      width, depth, heads, mlp_ratio: sizes.
      causal: a token sees only itself and those before it.
      dtype, remat, attention: see `flowjax.models.dit.DiT`.
    """

    vocab: int
    length: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    causal: bool = False
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "text_encoder"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sequence (B, length, width), pooled (B, width)), float32, of token ids (B, length)."""
        if tokens.shape[1] != self.length:
            raise ConfigError(f"a text encoder of length {self.length} was given {tokens.shape[1]} tokens")
        h = L.Embed(self.vocab, self.width, name="token_embed")(tokens)
        h = h + L.Embed(self.length, self.width, name="position_embed")(jnp.arange(self.length))
        h, _ = transformer(
            h,
            causal(self.length) if self.causal else None,
            depth=self.depth,
            heads=self.heads,
            hidden=int(self.mlp_ratio * self.width),
            mlp="gelu_tanh",
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
        )
        sequence = constrain(L.LayerNorm(1e-5, True, name="norm")(h), "batch", "seq", "act")
        return sequence, constrain(masked_mean(sequence, tokens != PADDING), "batch", "act")


def encoder_of(network: nn.Module) -> TextTransformer:
    """The submodule "encoder" that a network's field `text_encoder` describes, to be called in its compact method; what that does
    not say of dtype, remat and attention is the network's own."""
    fields = check(TextTransformer, network.text_encoder, "model.text_encoder", given=("parent", "name"))
    own = {name: getattr(network, name) for name in ("dtype", "remat", "attention")}
    return TextTransformer(**own | fields, name="encoder")


def masked_mean(sequence: jax.Array, keep: jax.Array) -> jax.Array:
    """Mean of sequence (B, L, D) over the tokens to keep (B, L), or over all of them where that is none."""
    keep = (keep | ~jnp.any(keep, axis=1, keepdims=True)).astype(sequence.dtype)
    return jnp.einsum("bld,bl->bd", sequence, keep) / jnp.sum(keep, axis=1, keepdims=True)
