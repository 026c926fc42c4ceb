"""Perceptual distances: how far two images are apart in the features of a frozen network.

    d(x, y) = sum over maps of  mean over positions |f(x) - f(y)|^2

A network takes part by a method `feature_maps(x) -> (B, h, w, C) maps`, already normalised and weighted, so that this is all there is
to a distance. LPIPS (1801.03924) is one: VGG16 features of unit length at each position, channels weighted by what was fitted to
human judgements. `Classifier`s trained here are another; what they measure is not LPIPS, and is not called so.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.models.layers import Conv
from flowjax.models.resblock import constrain_image

# Widths of VGG16's convolutions (1409.1556, column D); the features are taken before each pooling.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Of the pixels that the weights were made for, in [-1, 1]: ImageNet's mean and deviation on that scale.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def distance(net, x: jax.Array, y: jax.Array) -> jax.Array:
    """d(x, y) per image, (B,) float32, of images (B, H, W, C) in [-1, 1] by a network with `feature_maps`."""
    pairs = zip(net.feature_maps(x), net.feature_maps(y), strict=True)
    return sum(jnp.mean(jnp.sum(jnp.square(a - b), axis=-1), axis=(1, 2)) for a, b in pairs)


def unit(h: jax.Array) -> jax.Array:
    """Features (B, h, w, C) as float32 vectors of length one (nought stays nought, with a finite derivative)."""
    h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    return h * jax.lax.rsqrt(jnp.sum(jnp.square(h), axis=-1, keepdims=True) + 1e-10)


class Channels(nn.Module):
    """Scales channel c of (B, h, w, C) by sqrt(w_c), for weights w >= 0: w (a - b)^2 = (sqrt(w) a - sqrt(w) b)^2."""

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (None, None, "small", "small"))
        return h * jnp.sqrt(self.param("kernel", init, (1, 1, h.shape[-1], 1))[0, 0, :, 0])


class LPIPS(nn.Module):
    """VGG16 up to its last convolution, with fitted weights for the channels of five maps.

    Fields: widths of the convolutions of each block (others than VGG16's are for tests); dtype of the convolutions. The parameters
    are published ones (flowjax.interop.lpips); untrained they measure nothing.
    """

    widths: tuple = VGG16
    dtype: str = "float32"

    kind = "perceptual"

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """One (B, H / 2^i, W / 2^i, C_i) float32 map per block i, of RGB images (B, H, W, 3) in [-1, 1]."""
        least = 2 ** (len(self.widths) - 1)
        if x.shape[-1] != 3 or min(x.shape[1:3]) < least:
            raise ConfigError(f"LPIPS takes RGB images of at least {least} x {least}; got {x.shape}")
        h, maps = (x - jnp.asarray(SHIFT, x.dtype)) / jnp.asarray(SCALE, x.dtype), []
        for i, widths in enumerate(self.widths):
            if i:
                h = nn.max_pool(h, (2, 2), (2, 2))
            for j, width in enumerate(widths):
                h = constrain_image(nn.relu(Conv(width, dtype=self.dtype, name=f"conv_{i}_{j}")(h)))
            maps.append(constrain_image(Channels(name=f"weight_{i}")(unit(h))))
        return tuple(maps)

    def feature_maps(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The maps of `distance`."""
        return self(x)
