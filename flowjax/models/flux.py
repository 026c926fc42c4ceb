"""FLUX.1 (black-forest-labs; no paper): MMDiT's layers of two streams, then layers over one stream of text and image.

Positions are rotary: a token stands at (0, row, column), every token of the text at (0, 0, 0), so that the order of the text is
known from its embedding alone. t = 1 is noise and the published weights predict z - x, our "velocity"; time and guidance are
embedded times 1000. Padding of the text is a token like any other (no mask).
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from flowjax.conditions import need
from flowjax.config import ConfigError
from flowjax.models import layers as L
from flowjax.models.attention import attention
from flowjax.models.dit import Head, check_sizes, modulation, queries_keys_values
from flowjax.models.mmdit import JointBlock, Pooled, empty, normed
from flowjax.models.remat import ATTENTION, BLOCK
from flowjax.models.sharding import constrain
from flowjax.models.stack import stack


def pack(x: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) -> (B, N, C * patch * patch): patches row by row, each read as (channel, row, column), unlike `patchify`."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpack(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `pack` for an image of height x width pixels."""
    return rearrange(tokens, "b (h w) (c p q) -> b (h p) (w q) c", p=patch, q=patch, h=height // patch, w=width // patch)


def rope_angles(axes: Sequence[int], rows: int, columns: int) -> np.ndarray:
    """Angles (rows * columns, sum(axes) / 2) of tokens at (0, row, column); axis i has axes[i] / 2 frequencies 10000^(-2k/axes[i])."""
    row, column = (places.ravel() for places in np.mgrid[:rows, :columns].astype(np.float64))
    frequencies = (10000.0 ** (-np.arange(0, size, 2) / size) for size in axes)
    return np.concatenate([np.outer(place, f) for place, f in zip((0 * row, row, column), frequencies, strict=True)], axis=1)


class SingleBlock(nn.Module):
    """One layer on text and image in one sequence h (B, S + N, D): attention and MLP read the same norm and share a gate.

    The output matrix over (attention, MLP) is kept as two, each of which splits over its own inputs; so are q, k, v and the
    MLP's first matrix.
    """

    heads: int
    hidden: int
    implementation: str
    dtype: str

    @nn.compact
    def __call__(self, h, c, angles):
        h, width = checkpoint_name(h, BLOCK), h.shape[-1]
        shift, scale, gate = modulation(c, 3, width, True, self.dtype, "adaln")
        n = normed(h, shift, scale, self.dtype)
        y = attention(*queries_keys_values(n, self.heads, True, angles, self.dtype), implementation=self.implementation)
        y = constrain(checkpoint_name(rearrange(y, "b n h d -> b n (h d)"), ATTENTION), "batch", "seq", "act_heads")
        m = constrain(L.Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1")(n), "batch", "seq", "act_mlp")
        m = L.Linear(width, ("mlp", "embed"), bias=False, dtype=self.dtype, name="fc2")(nn.gelu(m, approximate=True))
        y = constrain(L.Linear(width, ("heads", "embed"), dtype=self.dtype, name="out")(y) + m, "batch", "seq", "act")
        return constrain((h + gate[:, None] * y).astype(self.dtype), "batch", "seq", "act"), None


class Flux(nn.Module):
    """FLUX.1 on latents (B, H, W, C) of any height and width that `patch` divides.

    Fields:
      depth, single_depth: layers of two streams and of one.   width, heads, mlp_ratio, patch: sizes.
      rope_axes: channels of a head that turn with (0, row, column); they add up to width / heads.
      guidance_embed: the scale of guidance is an input, cond["guidance"], as of weights that are distilled from guided ones.
      out_channels: 0 for as many as the input has.   time_scale: of the embeddings of time and guidance.
      dtype, remat, attention: as in `flowjax.models.dit.DiT`.
      scan: stack layers of a kind (parameters "double_blocks", "single_blocks"), not ("block_0", ...) or "unrolled"; see `flowjax.models.stack`.
    """

    depth: int
    single_depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    patch: int = 2
    rope_axes: tuple[int, ...] = (16, 56, 56)
    guidance_embed: bool = False
    out_channels: int = 0
    time_scale: float = 1000.0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool | str = True
    attention: str = "auto"

    kind = "denoiser"
    has_null = True
    presets = {
        name: {"depth": 19, "single_depth": 38, "width": 3072, "heads": 24, "guidance_embed": guidance}
        for name, guidance in (("flux1_dev", True), ("flux1_schnell", False))
    }

    def null(self, cond):
        """The condition of an empty prompt: zeros for its embeddings; the scale of guidance stays."""
        return empty(cond)

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Mapping, train: bool = False) -> jax.Array:
        """Prediction (B, H, W, out_channels) float32 for x (B, H, W, C) and t (B,) in [0, 1].

        cond: "text" (B, S, any size), "pooled" (B, any size) and with guidance_embed "guidance" (B,).
        """
        _, height, width, channels = x.shape
        self._check(height, width)

        c = L.embed_time(self, t, cond)
        c = constrain(c + Pooled(self.width, name="pooled_embed")(need(cond, "pooled", "a Flux")), "batch", "act")

        def tokens(source, name):
            h = L.Linear(self.width, ("small", "embed"), dtype=self.dtype, name=name)(source)
            return constrain(h, "batch", "seq", "act")

        text, image = tokens(need(cond, "text", "a Flux"), "text_embed"), tokens(pack(x, self.patch), "x_embed")
        length, hidden = text.shape[1], int(self.mlp_ratio * self.width)
        angles = jnp.asarray(rope_angles(self.rope_axes, height // self.patch, width // self.patch), jnp.float32)

        double = self.heads, hidden, True, False, False, 0.0, self.attention, self.dtype, train
        single = self.heads, hidden, self.attention, self.dtype
        how = {"scan": self.scan, "remat": self.remat}
        (text, image), _ = stack(JointBlock, double, self.depth, name="double_blocks", **how)((text, image), c, angles)
        h = constrain(jnp.concatenate([text, image], axis=1), "batch", "seq", "act")
        angles = jnp.pad(angles, ((length, 0), (0, 0)))
        h, _ = stack(SingleBlock, single, self.single_depth, name="single_blocks", first=self.depth, **how)(h, c, angles)

        image = constrain(h[:, length:], "batch", "seq", "act")
        y = Head(self.patch**2 * (self.out_channels or channels), "adaln_zero", "layer", self.dtype, name="final")(image, c)
        return unpack(constrain(y, "batch", "seq", "act"), self.patch, height, width)

    def _check(self, height: int, width: int):
        check_sizes(self, height, width)
        axes = self.rope_axes
        if len(axes) != 3 or any(size % 2 for size in axes) or sum(axes) != self.width // self.heads:
            raise ConfigError(f"model.rope_axes = {tuple(axes)} must be three even sizes that add up to {self.width // self.heads}")
        if self.depth < 1 or self.single_depth < 1:
            raise ConfigError(f"model.depth = {self.depth} and model.single_depth = {self.single_depth} must be at least 1")
