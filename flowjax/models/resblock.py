"""The convolutional parts that the U-Net and the autoencoder share: residual block, spatial attention, resampling.

All of them take and return channel-last images (B, H, W, C). Every branch, modulation vector and sum is constrained to the
batch layout (see `sharding`). Initialisation: `out_init` is the kernel of the last layer of each branch (zeros in DDPM and
ADM, so that a new block is the identity); all other convolutions are LeCun-normal, all other matrices Xavier-uniform.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flowjax.config import ConfigError
from flowjax.models.attention import attention
from flowjax.models.layers import Conv, GroupNorm, Linear, lecun
from flowjax.models.remat import ATTENTION, BLOCK
from flowjax.models.sharding import constrain

# Zeros around the image before a stride-2 3x3 convolution, (before, after) per axis. "end" is what TensorFlow's SAME does on
# even sizes (DDPM, latent diffusion); "symmetric" is torch's padding=1.
DOWN_PADDING = {"end": ((0, 1), (0, 1)), "symmetric": ((1, 1), (1, 1))}


def constrain_image(x: jax.Array) -> jax.Array:
    """Split (B, H, W, C) over the batch only."""
    return constrain(x, "batch", None, None, "act")


def check_sizes(where: str, channels: int, multipliers: tuple, groups: int, x: jax.Array):
    """ConfigError unless `groups` divides the width of every level and every level has whole pixels, for x (B, H, W, C)."""
    if not multipliers or min(multipliers) < 1:
        raise ConfigError(f"{where}.multipliers = {multipliers}: one whole number >= 1 per level")
    for multiplier in multipliers:
        if channels * multiplier % groups:
            raise ConfigError(f"{where}.groups = {groups} does not divide channels x multiplier = {channels} x {multiplier}")
    factor = 2 ** (len(multipliers) - 1)
    if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
        raise ConfigError(
            f"{where}.multipliers has {len(multipliers)} levels, which needs (B, H, W, C) with H and W divisible by {factor}; "
            f"got {x.shape}"
        )


def double(x: jax.Array) -> jax.Array:
    """Nearest-neighbour x2 of both sides."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def halve(x: jax.Array) -> jax.Array:
    """Mean of each 2x2 square."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class Downsample(nn.Module):
    """Stride-2 3x3 convolution, (B, H, W, C) -> (B, H/2, W/2, C); `padding` is a key of DOWN_PADDING."""

    padding: str = "end"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = Conv(x.shape[-1], stride=2, padding=DOWN_PADDING[self.padding], dtype=self.dtype, name="conv")
        return constrain_image(conv(x))


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution: (B, H, W, C) -> (B, 2H, 2W, C)."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return constrain_image(Conv(x.shape[-1], dtype=self.dtype, name="conv")(double(x)))


class ResBlock(nn.Module):
    """GN, SiLU, conv, (+ time), GN, SiLU, dropout, conv, plus the input (through a 1x1 convolution if widths differ).

    `emb` (B, E) float32, where given, is passed through SiLU and a Linear and either added per channel (DDPM) or, with
    `scale_shift`, applied as h (1 + scale) + shift after the second norm (ADM's AdaGN). `resample` "up" or "down" doubles
    or halves the image on both branches, in front of the first convolution (BigGAN).
    """

    features: int
    groups: int
    eps: float
    scale_shift: bool = False
    resample: str = "none"
    dropout: float = 0.0
    train: bool = False
    out_init: Callable = lecun
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array | None = None) -> jax.Array:
        x = checkpoint_name(x, BLOCK)
        resample = {"none": lambda image: image, "up": double, "down": halve}[self.resample]
        h = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm_1")(x))
        x, h = resample(x), resample(h)
        h = constrain_image(Conv(self.features, dtype=self.dtype, name="conv_1")(h))
        norm = GroupNorm(self.groups, self.eps, name="norm_2")
        if emb is None:
            h = norm(h)
        else:
            size = 2 * self.features if self.scale_shift else self.features
            time = constrain(Linear(size, ("embed", "mlp"), name="time")(nn.silu(emb)), "batch", "act")[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                h = norm(h) * (1 + scale) + shift
            else:
                h = norm(h + time)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=not self.train)
        h = constrain_image(Conv(self.features, kernel_init=self.out_init, dtype=self.dtype, name="conv_2")(h))
        if x.shape[-1] != self.features:
            shortcut = Conv(self.features, kernel=(1, 1), padding=((0, 0), (0, 0)), dtype=self.dtype, name="shortcut")
            x = constrain_image(shortcut(x))
        return constrain_image(x + h)


class AttentionBlock(nn.Module):
    """x + Linear(attention(GN(x))) over all positions; `head_dim` 0 is one head of the full width."""

    groups: int
    eps: float
    head_dim: int = 0
    out_init: Callable = lecun
    implementation: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = checkpoint_name(x, BLOCK)
        b, height, width, c = x.shape
        head_dim = self.head_dim or c
        if c % head_dim:
            raise ConfigError(f"head_dim = {head_dim} does not divide the width {c} of an attention block")
        h = GroupNorm(self.groups, self.eps, self.dtype, name="norm")(x).reshape(b, height * width, c)
        q, k, v = (
            constrain(
                Linear(c, ("embed", "heads"), dtype=self.dtype, name=name)(h).reshape(b, -1, c // head_dim, head_dim),
                *("batch", "seq", "act_heads", None),
            )
            for name in ("query", "key", "value")
        )
        h = checkpoint_name(attention(q, k, v, implementation=self.implementation), ATTENTION).reshape(b, height, width, c)
        h = Linear(c, ("heads", "embed"), self.out_init, dtype=self.dtype, name="out")(h)
        return constrain_image(x + constrain_image(h))
