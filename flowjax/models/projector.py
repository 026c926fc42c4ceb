"""The head that turns a denoiser's hidden state into a guess of another network's features (REPA, 2410.06940)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from flowjax import config
from flowjax.models import layers as L
from flowjax.models.sharding import constrain


class Projector(nn.Module):
    """Hidden tokens (B, N, D) of a grid -> (B, rows, columns, features) float32.

    Fields:
      layer: the layer of the denoiser, counted from 1, after which the tokens are taken. Several, each with a head of its own, make
        `features` features each, one behind the other: discriminators judge by many layers (LADD, 2403.12015).
      features: width of the encoder's tokens.
      hidden: of the three linear maps of each token, with SiLU between them.
      conv: one 3x3 convolution over the grid instead, which keeps neighbours apart better (iREPA, 2512.10794).
      dtype: of the products.
    """

    layer: int | tuple[int, ...]
    features: int
    hidden: int = 2048
    conv: bool = False
    dtype: str = "float32"

    @property
    def unread(self) -> dict[str, str]:
        """Fields that do nothing beside the others, and why."""
        return {"hidden": "with model.projector.conv"} if self.conv else {}

    @property
    def layers(self) -> tuple[int, ...]:
        """`layer` as a tuple."""
        return (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)

    @nn.compact
    def __call__(self, states: dict[int, jax.Array], grid: tuple[int, int]) -> jax.Array:
        """states: {layer: hidden tokens after it}."""
        if isinstance(self.layer, int):
            return self._head(states[self.layer], grid, "")
        return jnp.concatenate([self._head(states[layer], grid, f"_{layer}") for layer in self.layers], axis=-1)

    def _head(self, h: jax.Array, grid: tuple[int, int], suffix: str) -> jax.Array:
        if self.conv:
            h = rearrange(h, "b (r c) d -> b r c d", r=grid[0])
            y = L.Conv(self.features, kernel_init=L.xavier, dtype=self.dtype, name=f"conv{suffix}")(h)
        else:
            h = nn.silu(L.Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name=f"fc1{suffix}")(h))
            h = nn.silu(L.Linear(self.hidden, ("mlp", "embed"), dtype=self.dtype, name=f"fc2{suffix}")(h))
            y = L.Linear(self.features, ("embed", "small"), dtype=self.dtype, name=f"fc3{suffix}")(h)
            y = rearrange(constrain(y, "batch", "seq", "act"), "b (r c) d -> b r c d", r=grid[0])
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))


def build(section, depth: int, dtype: str) -> Projector:
    """The submodule "projector" of a network of `depth` layers; to be called in its compact method."""
    if section is None:
        raise config.ConfigError("model.projector is missing: a section such as {'layer': 8, 'features': 768}")
    fields = config.check(Projector, section, "model.projector", given=("parent", "name", "dtype"))
    layer = fields["layer"]
    several = isinstance(layer, list | tuple)
    layers = tuple(layer) if several else (layer,)
    if not layers or len({*layers}) < len(layers) or not all(isinstance(n, int) and 1 <= n <= depth for n in layers):
        raise config.ConfigError(f"model.projector.layer = {layer}; valid: 1 to {depth}, or several of them, each once")
    fields["layer"] = layers if several else layer
    return config.refuse_unread(Projector(**fields, dtype=dtype, name=L.PROJECTOR), section, "model.projector")
