"""The convolutional KL autoencoder of latent diffusion (2112.10752, appendix G) and the statistics of its latents.

The encoder gives a diagonal Gaussian q(z | x) by mean and log-variance; the decoder maps z back. Levels are as in the U-Net:
level l has width channels * multipliers[l], and each of the levels - 1 downsamplings halves the sides, so a latent position
stands for f x f pixels with f = 2^(levels - 1). There is no output non-linearity.

A diffusion model wants latents of unit scale. `measure` finds the per-channel mean and standard deviation over a data set;
they belong into the autoencoder's checkpoint, because they are a property of its weights.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.models.layers import Conv, GroupNorm
from flowjax.models.resblock import AttentionBlock, Downsample, ResBlock, Upsample, check_sizes, constrain_image

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


class Middle(nn.Module):
    """Residual block, single-head attention over all positions (optional), residual block; width unchanged."""

    groups: int
    attention: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        h = ResBlock(h.shape[-1], self.groups, EPS, dtype=self.dtype, name="res_0")(h)
        if self.attention:
            h = AttentionBlock(self.groups, EPS, dtype=self.dtype, name="attn_0")(h)
        return ResBlock(h.shape[-1], self.groups, EPS, dtype=self.dtype, name="res_1")(h)


class Encoder(nn.Module):
    """Image (B, H, W, C) -> (B, H/f, W/f, features) float32; `layers` residual blocks per level, TensorFlow-style padding."""

    features: int
    channels: int
    multipliers: tuple[int, ...]
    layers: int
    groups: int
    mid_attention: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        res_block = functools.partial(ResBlock, groups=self.groups, eps=EPS, dtype=self.dtype)
        h = constrain_image(Conv(self.channels, dtype=self.dtype, name="conv_in")(x))
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.layers):
                h = res_block(self.channels * multiplier, name=f"down_{level}_res_{i}")(h)
            if level < len(self.multipliers) - 1:
                h = Downsample("end", self.dtype, name=f"down_{level}_sample")(h)
        h = Middle(self.groups, self.mid_attention, self.dtype, name="mid")(h)
        h = nn.silu(GroupNorm(self.groups, EPS, name="norm_out")(h))
        return constrain_image(Conv(self.features, axes=("conv_in", "small"), name="conv_out")(h))


class Decoder(nn.Module):
    """Latent (B, h, w, Z) -> image (B, f h, f w, features) float32; `layers` + 1 residual blocks per level."""

    features: int
    channels: int
    multipliers: tuple[int, ...]
    layers: int
    groups: int
    mid_attention: bool
    dtype: str

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        res_block = functools.partial(ResBlock, groups=self.groups, eps=EPS, dtype=self.dtype)
        h = constrain_image(Conv(self.channels * self.multipliers[-1], dtype=self.dtype, name="conv_in")(z))
        h = Middle(self.groups, self.mid_attention, self.dtype, name="mid")(h)
        for level in reversed(range(len(self.multipliers))):
            for i in range(self.layers + 1):
                h = res_block(self.channels * self.multipliers[level], name=f"up_{level}_res_{i}")(h)
            if level > 0:
                h = Upsample(self.dtype, name=f"up_{level}_sample")(h)
        h = nn.silu(GroupNorm(self.groups, EPS, name="norm_out")(h))
        return constrain_image(Conv(self.features, axes=("conv_in", "small"), name="conv_out")(h))


class AutoencoderKL(nn.Module):
    """Encoder and decoder around a Gaussian latent of `latent_channels` channels at 1/f of the image's sides.

    Fields: `channels`, `multipliers`, `layers`, `groups` as in the U-Net; `image_channels` of what the decoder returns;
    `quant_conv` adds the 1x1 convolutions around the latent that the first latent diffusion models have; `mid_attention`;
    `dtype` "float32" or "bfloat16" of convolutions and attention.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    layers: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    quant_conv: bool = False
    mid_attention: bool = True
    groups: int = 32
    dtype: str = "float32"

    kind = "autoencoder"
    last_layer = ("decoder", "conv_out", "kernel")  # where reconstruction and discriminator are weighed against each other
    presets = {
        "kl_f4_z3": {"channels": 128, "multipliers": (1, 2, 4), "layers": 2, "latent_channels": 3, "quant_conv": True},
        "kl_f8_z4": {"channels": 128, "multipliers": (1, 2, 4, 4), "layers": 2, "latent_channels": 4, "quant_conv": True},
        "kl_f8_z16": {"channels": 128, "multipliers": (1, 2, 4, 4), "layers": 2, "latent_channels": 16, "quant_conv": False},
        "kl_f8_z16_quant": {"channels": 128, "multipliers": (1, 2, 4, 4), "layers": 2, "latent_channels": 16, "quant_conv": True},
    }

    @property
    def factor(self) -> int:
        """Pixels per latent position along each side."""
        return 2 ** (len(self.multipliers) - 1)

    def setup(self):
        sizes = (self.channels, self.multipliers, self.layers, self.groups, self.mid_attention, self.dtype)
        self.encoder = Encoder(2 * self.latent_channels, *sizes)
        self.decoder = Decoder(self.image_channels, *sizes)
        if self.quant_conv:
            pointwise = functools.partial(Conv, kernel=(1, 1), padding=((0, 0), (0, 0)), axes=("small", "small"))
            self.quant = pointwise(2 * self.latent_channels)
            self.post_quant = pointwise(self.latent_channels)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean, logvar) of q(z | x), each (B, H/f, W/f, latent_channels) float32, for x (B, H, W, C) in [-1, 1]."""
        check_sizes("model", self.channels, self.multipliers, self.groups, x)
        h = self.encoder(x)
        h = self.quant(h) if self.quant_conv else h
        mean, logvar = jnp.split(constrain_image(h), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: jax.Array) -> jax.Array:
        """Image (B, f h, f w, image_channels) float32 of z (B, h, w, latent_channels)."""
        return self.decoder(self.post_quant(z) if self.quant_conv else z)

    def reconstruct(self, x: jax.Array) -> jax.Array:
        """Images (B, H, W, C) through the posterior's mean and back."""
        return self.decode(self.encode(x)[0])

    @staticmethod
    def sample(mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
        """A sample of N(mean, exp(logvar)), differentiable in both."""
        return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)

    def __call__(self, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(reconstruction of x from one sample of q(z | x), mean, logvar)."""
        mean, logvar = self.encode(x)
        return self.decode(self.sample(mean, logvar, key)), mean, logvar


def kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, I)) per sample in nats: (B, ...) -> (B,), summed over all other axes."""
    terms = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return jnp.sum(terms, axis=tuple(range(1, mean.ndim)))


class LatentStats(NamedTuple):
    """Per-channel mean (C,) and standard deviation (C,) of latents."""

    mean: np.ndarray
    std: np.ndarray


def normalise(z: jax.Array, stats: LatentStats) -> jax.Array:
    """Latents (..., C) -> zero mean and unit variance per channel: what the diffusion model sees."""
    return (z - stats.mean) / stats.std


def denormalise(z: jax.Array, stats: LatentStats) -> jax.Array:
    """Inverse of `normalise`: what the decoder takes."""
    return z * stats.std + stats.mean


def measure(batches: Iterable[np.ndarray]) -> LatentStats:
    """Mean and (population) standard deviation over all axes but the last of an iterable of latents (..., C), as float32.

    Batches may differ in size. Moments are merged in float64 by Chan, Golub & LeVeque (1979), which unlike E[z^2] - E[z]^2 does
    not cancel. ValueError where there is nothing to measure, a latent is not finite, or a channel is constant.
    """
    count, mean, m2 = 0, 0.0, 0.0
    for batch in batches:
        batch = np.asarray(batch, np.float64)
        batch = batch.reshape(-1, batch.shape[-1])
        new = len(batch)
        delta = batch.mean(0) - mean
        m2 = m2 + np.square(batch - batch.mean(0)).sum(0) + delta**2 * count * new / (count + new)
        mean = mean + delta * new / (count + new)
        count += new
    if not count:
        raise ValueError("no latents to measure")
    if not np.all(np.isfinite(m2)) or not np.all(m2 > 0):
        raise ValueError(f"latents need a finite, positive variance in every channel; sums of squares: {m2}")
    return LatentStats(mean.astype(np.float32), np.sqrt(m2 / count).astype(np.float32))
