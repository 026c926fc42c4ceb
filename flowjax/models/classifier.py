"""A small convolutional classifier of images: the feature network of evaluation, and the guide of classifier guidance."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.models import layers as L
from flowjax.models.perceptual import unit
from flowjax.models.sharding import constrain


class Classifier(nn.Module):
    """Residual convolutions, `stages` of them at falling resolution and rising width, mean pooling, one hidden layer.

    Fields: num_classes; width of the first stage (a multiple of `groups`, doubled at each further one); stages; features,
    the size of the penultimate layer; groups of GroupNorm; dropout on the penultimate layer when train; time, whether the
    network also takes the time t of a noisy image (classifier guidance); dtype of the convolutions.
    """

    num_classes: int
    width: int = 32
    stages: int = 2
    features: int = 128
    groups: int = 8
    dropout: float = 0.0
    time: bool = False
    dtype: str = "float32"

    kind = "classifier"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, t: jax.Array | None = None, features: bool = False, maps: bool = False):
        """Logits (B, num_classes) float32 of x (B, H, W, C); with `features` the penultimate layer (B, features), with `maps` the
        output of every stage (B, H / 2^i, W / 2^i, width 2^i).

        t (B,) in [0, 1] is required when the field `time` is set and refused when it is not.
        """
        if (t is not None) != self.time:
            raise ConfigError(f"a classifier with time = {self.time} was called {'without' if t is None else 'with'} t")
        c = nn.silu(L.TimeEmbed(4 * self.width, name="t_embed")(t)) if self.time else None

        def normalised(h, name):
            return nn.silu(L.GroupNorm(self.groups, 1e-5, self.dtype, name=name)(h))

        def conv(channels, name, stride=1):
            return L.Conv(channels, stride=stride, dtype=self.dtype, name=name)

        def fixed(h):
            return constrain(h, "batch", None, None, "act")

        h, outputs = fixed(conv(self.width, "stem")(x)), []
        for i in range(self.stages):
            channels = self.width * 2**i
            if i:
                h = fixed(conv(channels, f"down_{i}", stride=2)(h))
            y = fixed(conv(channels, f"conv1_{i}")(normalised(h, f"norm1_{i}")))
            if self.time:
                shift = L.Linear(channels, ("embed", "conv_out"), dtype=self.dtype, name=f"time_{i}")(c)
                y = y + constrain(shift, "batch", "act")[:, None, None]
            h = fixed(h + fixed(conv(channels, f"conv2_{i}")(normalised(y, f"norm2_{i}"))))
            outputs.append(h)
        if maps:
            return tuple(outputs)

        h = jnp.mean(normalised(h, "norm").astype(jnp.float32), axis=(1, 2))
        h = constrain(nn.silu(L.Linear(self.features, ("embed", "mlp"), L.lecun, name="hidden")(h)), "batch", "act")
        if features:
            return h
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        return L.Linear(self.num_classes, ("embed", "small"), L.zeros, name="logits")(h)

    def feature_maps(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The maps of `perceptual.distance`: unit vectors at every position of every stage."""
        return tuple(constrain(unit(h), "batch", None, None, "act") for h in self(x, maps=True))
