"""A causal language model: what the next token is, given those before it."""

import flax.linen as nn
import jax

from flowjax.models import layers as L
from flowjax.models.sharding import constrain
from flowjax.models.text import TextTransformer


class LanguageModel(nn.Module):
    """`flowjax.models.text.TextTransformer`, in which a token sees itself and those before it, and a linear head.

    Token 0 ends a text and is what rows are padded with. After the end of one text another may follow in the same row.

    Fields: those of TextTransformer (parameters "trunk"; the head is "head").
    """

    vocab: int
    length: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "language_model"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, length, vocab), float32, of the token after each of `tokens` (B, length)."""
        names = ("vocab", "length", "width", "depth", "heads", "mlp_ratio", "dtype", "remat", "attention")
        trunk = TextTransformer(**{k: getattr(self, k) for k in names}, causal=True, name="trunk")
        logits = L.Linear(self.vocab, ("embed", "vocab"), L.normal(0.02), name="head")(trunk(tokens)[0])
        return constrain(logits, "batch", "seq", None)
