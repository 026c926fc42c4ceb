"""Discriminators: that of patches of pix2pix (1611.07004, section 3.2.2), as VQGAN and latent diffusion train their autoencoders
against, and a head on another network's features.

PatchGAN: each logit judges one patch of the image: with three layers, 70 x 70 pixels every 8 pixels. The papers use batch normalisation,
whose statistics tie an example's logits to the rest of its batch; here each example is normalised by itself, so that neither
sharding nor gradient accumulation changes a logit. The number of parameters is the same.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.models.layers import Conv, GroupNorm, Linear, normal
from flowjax.models.resblock import constrain_image


class PatchGAN(nn.Module):
    """4x4 convolutions with LeakyReLU(0.2): `layers` of stride 2, one of stride 1, one to the logits.

    Fields: channels of the first layer, doubled at each further one up to 8 times; layers (3: patches of 70 pixels, 2: 34,
    1: 16); norm "group" or "none" of all but the first and the last layer; groups of that norm; dtype of the convolutions.
    """

    channels: int = 64
    layers: int = 3
    norm: str = "group"
    groups: int = 32
    dtype: str = "float32"

    kind = "discriminator"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (B, h, w) float32, high for data, of x (B, H, W, C) in [-1, 1]; at 256 x 256 and three layers, 30 x 30."""
        if self.norm not in ("group", "none"):
            raise ConfigError(f"model.norm = {self.norm!r} of a PatchGAN is unknown; valid: group, none")
        if self.layers < 1:
            raise ConfigError(f"model.layers = {self.layers} of a PatchGAN should be at least 1")
        if min(x.shape[1:3]) < (least := 3 * 2**self.layers):
            raise ConfigError(f"images of {x.shape[1]} x {x.shape[2]} are too small for {self.layers} layers, which need {least} pixels")

        def conv(h, features, name, stride, **options):
            # As DCGAN: weights N(0, 0.02).
            return constrain_image(Conv(features, (4, 4), stride, kernel_init=normal(0.02), name=name, **options)(h))

        h = nn.leaky_relu(conv(x, self.channels, "conv_0", 2, dtype=self.dtype), 0.2)
        for i in range(1, self.layers + 1):
            normed = self.norm == "group"  # whose bias makes that of the convolution idle
            h = conv(h, self.channels * min(2**i, 8), f"conv_{i}", 2 if i < self.layers else 1, bias=not normed, dtype=self.dtype)
            h = nn.leaky_relu(GroupNorm(self.groups, 1e-5, self.dtype, name=f"norm_{i}")(h) if normed else h, 0.2)
        return conv(h, 1, "logits", 1, axes=("conv_in", "small"))[..., 0]


class FeatureHead(nn.Module):
    """Two linear maps with LeakyReLU(0.2) between, of each place by itself, for features of a frozen encoder (ADD 2311.17042).

    Fields: hidden size; dtype of the products.
    """

    hidden: int = 256
    dtype: str = "float32"

    kind = "discriminator"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Logits (B, rows, columns) float32, high for data, of an image's features (B, rows, columns, F)."""
        h = nn.leaky_relu(Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1")(features), 0.2)
        return Linear(1, ("mlp", "small"), name="fc2")(h.astype(jnp.promote_types(h.dtype, jnp.float32)))[..., 0]
