"""CLIP (2103.00020) and OpenCLIP: the towers on their own, as encoders of images and text, and both with their temperature."""

import functools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, check
from flowjax.models import layers as L
from flowjax.models.encoder import causal, transformer
from flowjax.models.sharding import constrain
from flowjax.models.two_tower import bounded, unit
from flowjax.models.vit import Embeddings

PIXELS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
LEGACY_EOS = 2

SIZES = {
    "ViT-B/32": {"text": (512, 12, 8), "image": (768, 12, 12), "patch": 32, "features": 512},
    "ViT-B/16": {"text": (512, 12, 8), "image": (768, 12, 12), "patch": 16, "features": 512},
    "ViT-L/14": {"text": (768, 12, 12), "image": (1024, 24, 16), "patch": 14, "features": 768},
}
TEXTS = {name: dict(zip(("width", "depth", "heads"), size["text"])) for name, size in SIZES.items()}
IMAGES = {
    name: dict(zip(("width", "depth", "heads"), size["image"])) | {"patch": size["patch"], "grid": 224 // size["patch"]}
    for name, size in SIZES.items()
}


class CLIPText(nn.Module):
    """Causal transformer over token ids. Padding, which stands behind the end token, is never seen by what comes before it.

    Fields:
      width, depth, heads, vocab, length: sizes; prompts may be shorter than `length`.
      mlp: "quick_gelu" for the weights of OpenAI, "gelu" for those of OpenCLIP.
      eos: id of the end token, whose first place is pooled; 2 stands for files from before that was settled, which mean the
        place of the largest id.
      features: size of the projection of the pooled vector; 0 for none.
      penultimate: the sequence is the state before the last layer, without the final norm (SDXL, SD3), not the last after it.
        The pooled vector comes from the last either way.
      dtype, remat, attention: see `flowjax.models.dit.DiT`.
    """

    width: int
    depth: int
    heads: int
    vocab: int = 49408
    length: int = 77
    mlp: str = "quick_gelu"
    eos: int = 49407
    features: int = 0
    penultimate: bool = False
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "text_encoder"
    presets = {**TEXTS, "bigG": {"width": 1280, "depth": 32, "heads": 20, "mlp": "gelu", "features": 1280}}

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sequence (B, L, width), pooled (B, features or width)), float32, of token ids (B, L), L at most `length`."""
        length = tokens.shape[1]
        if length > self.length:
            raise ConfigError(f"a text encoder of length {self.length} was given {length} tokens")
        if self.penultimate and self.depth < 2:
            raise ConfigError("model.penultimate needs model.depth of at least 2")
        h = L.Embed(self.vocab, self.width, name="token_embed")(tokens)
        h = h + L.Embed(self.length, self.width, name="position_embed")(jnp.arange(length))
        h, before = transformer(
            h, causal(length), depth=self.depth, heads=self.heads, hidden=4 * self.width, mlp=self.mlp,
            dtype=self.dtype, remat=self.remat, attention=self.attention, tap=self.depth - 1 if self.penultimate else 0,
        )  # fmt: skip
        h = constrain(L.LayerNorm(1e-5, True, name="norm")(h), "batch", "seq", "act")
        end = jnp.argmax(tokens if self.eos == LEGACY_EOS else tokens == self.eos, axis=1)
        pooled = jnp.take_along_axis(h, end[:, None, None], axis=1)[:, 0]
        if self.features:
            pooled = L.Linear(self.features, ("embed", "small"), bias=False, name="projection")(pooled)
        return before.astype(h.dtype) if self.penultimate else h, constrain(pooled, "batch", "act")


class CLIPVision(nn.Module):
    """Transformer over patches and a class token, with a norm before it; only the pooled vector gets the norm after it.

    Fields: as `flowjax.models.vit.ViT`; features, the size of the projection of the pooled vector, 0 for none.
    """

    patch: int
    width: int
    depth: int
    heads: int
    grid: int
    mlp: str = "quick_gelu"
    features: int = 0
    mean: tuple = PIXELS["mean"]
    std: tuple = PIXELS["std"]
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "image_encoder"
    presets = IMAGES

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(states of the patches (B, N, width), pooled (B, features or width)), float32, of x (B, H, W, C) in [-1, 1]."""
        norm = functools.partial(L.LayerNorm, 1e-5, True)
        embed = Embeddings(self.width, self.patch, self.grid, bias=False, mean=self.mean, std=self.std, dtype=self.dtype, name="embed")
        h, _ = transformer(
            norm(name="pre_norm")(embed(x)), depth=self.depth, heads=self.heads, hidden=4 * self.width, mlp=self.mlp,
            dtype=self.dtype, remat=self.remat, attention=self.attention,
        )  # fmt: skip
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        pooled = norm(name="norm")(h[:, 0])
        if self.features:
            pooled = L.Linear(self.features, ("embed", "small"), bias=False, name="projection")(pooled)
        return constrain(h[:, 1:], "batch", "seq", "act"), constrain(pooled, "batch", "act")


class CLIP(nn.Module):
    """Both towers, with projections to `features`, and the temperature; the interface of `flowjax.models.two_tower.TwoTower`.

    image, text: fields of CLIPVision and CLIPText.
    """

    image: Mapping
    text: Mapping
    features: int
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "two_tower"
    presets = {name: {"image": IMAGES[name], "text": TEXTS[name], "features": size["features"]} for name, size in SIZES.items()}

    def tower(self, which: str) -> nn.Module:
        """The tower "image" or "text" on its own; its parameters are those of this network under "<which>_encoder"."""
        module, fields = {"image": (CLIPVision, self.image), "text": (CLIPText, self.text)}[which]
        fields = {"dtype": self.dtype, "remat": self.remat, "attention": self.attention, **fields, "features": self.features}
        return module(**check(module, fields, f"model.{which}", given=("parent", "name")), parent=None)

    def setup(self):
        self.image_encoder, self.text_encoder = self.tower("image"), self.tower("text")
        self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def embed_images(self, x: jax.Array) -> jax.Array:
        """Unit vectors (B, features) of x (B, H, W, C) in [-1, 1]."""
        return unit(self.image_encoder(x)[1])

    def embed_texts(self, tokens: jax.Array) -> jax.Array:
        """Unit vectors (B, features) of token ids (B, L)."""
        return unit(self.text_encoder(tokens)[1])

    def __call__(self, x: jax.Array, cond: Mapping) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(unit vectors of the images, of the captions, both (B, features), the factor that cosines are multiplied by ())."""
        return self.embed_images(x), self.embed_texts(cond["tokens"]), jnp.exp(bounded(self.log_scale))
