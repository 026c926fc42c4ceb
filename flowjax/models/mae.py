"""Masked autoencoder (2111.06377): a ViT that sees some patches, and a small decoder that fills in the others.

Trained by the objective `mae`, it is an encoder of whole images and can take the role "encoder" of REPA.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, check
from flowjax.models import layers as L
from flowjax.models.encoder import transformer
from flowjax.models.sharding import constrain
from flowjax.models.vit import ViT

EPS = 1e-6


class Decoder(nn.Module):
    """Pre-norm transformer over all patches, those not seen as a learned token; positions are MAE's fixed table."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    @nn.compact
    def __call__(self, tokens: jax.Array, first: jax.Array, order: jax.Array, grid: tuple[int, int], out: int) -> jax.Array:
        """(B, N, out) float32 of states (B, K, D) of the patches order[:, :K], that of the class token (B, D), and order (B, N)."""
        h = jnp.concatenate([first[:, None], tokens], axis=1)
        h = L.Linear(self.width, ("small", "embed"), dtype=self.dtype, name="embed")(h)
        h = constrain(h.astype(jnp.promote_types(h.dtype, jnp.float32)), "batch", "seq", "act")
        mask = L.Embed(1, self.width, name="mask")(jnp.zeros((order.shape[0], order.shape[1] - tokens.shape[1]), jnp.int32))
        patches = jnp.concatenate([h[:, 1:], mask], axis=1)
        patches = jnp.take_along_axis(patches, jnp.argsort(order, axis=1)[..., None], axis=1)
        patches = patches + jnp.asarray(L.sincos_2d(self.width, *grid), jnp.float32)
        h = constrain(jnp.concatenate([h[:, :1], patches], axis=1).astype(self.dtype), "batch", "seq", "act")
        h, _ = transformer(
            h, depth=self.depth, heads=self.heads, hidden=int(self.mlp_ratio * self.width), eps=EPS,
            dtype=self.dtype, remat=self.remat, attention=self.attention,
        )  # fmt: skip
        h = L.LayerNorm(EPS, True, name="norm")(h[:, 1:])
        return constrain(L.Linear(out, ("embed", "small"), name="linear")(h), "batch", "seq", "act")


class MAE(nn.Module):
    """Fields:

      encoder: fields of a `flowjax.models.vit.ViT` (parameters "encoder") that pools by its class token.
      decoder: fields of a `Decoder`: width, depth, heads, mlp_ratio.
      dtype, remat, attention: of both, as in `flowjax.models.dit.DiT`.
    """

    encoder: Mapping
    decoder: Mapping
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "image_encoder"
    presets = {
        size: {"encoder": ViT.presets[f"mae-{size}"], "decoder": {"width": 512, "depth": 8, "heads": 16}}
        for size in ("B/16", "L/16", "H/14")
    }

    @property
    def patch(self) -> int:
        """Pixels per side of a patch."""
        return self.encoder["patch"]

    @nn.compact
    def __call__(self, x: jax.Array, order: jax.Array | None = None, kept: int = 0):
        """(states of the patches (B, N, width), pooled (B, width)) of x (B, H, W, C) in [-1, 1].

        With order (B, N), a permutation of the patches for each image: the decoder's guess (B, N, patch * patch * C) of every
        patch, cut as by `flowjax.models.dit.patchify`, from the patches order[:, :kept] alone.
        """
        made = ("parent", "name", "dtype", "remat", "attention")
        options = {"dtype": self.dtype, "remat": self.remat, "attention": self.attention}
        encoder = ViT(**check(ViT, self.encoder, "model.encoder", given=made), **options, name="encoder")
        if encoder.pooling != "class":
            raise ConfigError(f"model.encoder.pooling = {encoder.pooling!r}: the decoder is given the class token's state")
        decoder = Decoder(**check(Decoder, self.decoder, "model.decoder", given=made), **options, name="decoder")
        grid = x.shape[1] // self.patch, x.shape[2] // self.patch

        def fill_in(order, kept):
            return decoder(*encoder(x, keep=order[:, :kept]), order, grid, self.patch**2 * x.shape[-1])

        if order is not None:
            return fill_in(order, kept)
        if self.is_initializing():  # whole images do not need the decoder, its parameters do need shapes
            fill_in(jnp.broadcast_to(jnp.arange(grid[0] * grid[1]), (x.shape[0], grid[0] * grid[1])), 1)
        return encoder(x)
