"""Two towers that embed images and captions on one sphere (CLIP, 2103.00020), small enough to be trained here."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, check
from flowjax.models import layers as L
from flowjax.models.sharding import constrain
from flowjax.models.text import TextTransformer
from flowjax.models.vit import ViT

MAX_SCALE = 100.0


@jax.custom_vjp
def bounded(log_scale: jax.Array) -> jax.Array:
    """min(log_scale, log 100), CLIP's bound of the temperature; beyond it only gradients that lead back get through.

    CLIP clips the parameter after each update. A plain minimum would hold a parameter that has once stepped over the bound
    there for ever, because its gradient is zero.
    """
    return jnp.minimum(log_scale, math.log(MAX_SCALE))


def _bounded_fwd(log_scale):
    return bounded(log_scale), log_scale < math.log(MAX_SCALE)


def _bounded_bwd(inside, g):
    return (jnp.where(inside | (g > 0), g, 0.0),)  # descent along a positive gradient makes the scale smaller


bounded.defvjp(_bounded_fwd, _bounded_bwd)


class TwoTower(nn.Module):
    """A ViT and a TextTransformer, each with a projection without bias to a common, normalised embedding.

    Fields:
      image, text: fields of the `flowjax.models.vit.ViT` and the `flowjax.models.text.TextTransformer` (parameters
        "image_encoder" and "text_encoder"); `dtype`, `remat` and `attention` are passed on to both unless they have their own.
      features: size of the embedding.
      temperature: that cosines are divided by, at the start; learned, never below 0.01.
    """

    image: Mapping
    text: Mapping
    features: int = 128
    temperature: float = 0.07
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "two_tower"

    def tower(self, which: str) -> nn.Module:
        """The encoder of "image" or "text" on its own; its parameters are those of this network under "<which>_encoder"."""
        module, fields = {"image": (ViT, self.image), "text": (TextTransformer, self.text)}[which]
        fields = {"dtype": self.dtype, "remat": self.remat, "attention": self.attention, **fields}
        return module(**check(module, fields, f"model.{which}", given=("parent", "name")), parent=None)

    def setup(self):
        if self.temperature < 1 / MAX_SCALE:
            raise ConfigError(f"model.temperature = {self.temperature} is below the least, {1 / MAX_SCALE}")
        self.image_encoder, self.text_encoder = self.tower("image"), self.tower("text")
        self.image_projection, self.text_projection = (
            L.Linear(self.features, ("embed", "small"), bias=False, kernel_init=L.lecun) for _ in range(2)
        )
        self.log_scale = self.param("log_scale", nn.initializers.constant(-math.log(self.temperature)), ())

    def embed_images(self, x: jax.Array) -> jax.Array:
        """Unit vectors (B, features) of x (B, H, W, C) in [-1, 1]."""
        return unit(self.image_projection(self.image_encoder(x)[1]))

    def embed_texts(self, tokens: jax.Array) -> jax.Array:
        """Unit vectors (B, features) of token ids (B, L)."""
        return unit(self.text_projection(self.text_encoder(tokens)[1]))

    def __call__(self, x: jax.Array, cond: Mapping) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(unit vectors of the images, of the captions, both (B, features), the factor that cosines are multiplied by ())."""
        return self.embed_images(x), self.embed_texts(cond["tokens"]), jnp.exp(bounded(self.log_scale))


def unit(v: jax.Array) -> jax.Array:
    """v (B, D) divided by its length."""
    v = v * jax.lax.rsqrt(jnp.sum(jnp.square(v), axis=-1, keepdims=True) + 1e-12)
    return constrain(v, "batch", "act")
