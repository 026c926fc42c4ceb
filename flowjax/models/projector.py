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
      layer: the layer of the denoiser, counted from 1, after which the tokens are taken.
      features: width of the encoder's tokens.
      hidden: of the three linear maps of each token, with SiLU between them.
      conv: one 3x3 convolution over the grid instead, which keeps neighbours apart better (iREPA, 2512.10794).
      dtype: of the products.
    """

    layer: int
    features: int
    hidden: int = 2048
    conv: bool = False
    dtype: str = "float32"

    @property
    def unread(self) -> dict[str, str]:
        """Fields that do nothing beside the others, and why."""
        return {"hidden": "with model.projector.conv"} if self.conv else {}

    @nn.compact
    def __call__(self, h: jax.Array, grid: tuple[int, int]) -> jax.Array:
        if self.conv:
            h = rearrange(h, "b (r c) d -> b r c d", r=grid[0])
            y = L.Conv(self.features, kernel_init=L.xavier, dtype=self.dtype, name="conv")(h)
        else:
            h = nn.silu(L.Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1")(h))
            h = nn.silu(L.Linear(self.hidden, ("mlp", "embed"), dtype=self.dtype, name="fc2")(h))
            y = L.Linear(self.features, ("embed", "small"), dtype=self.dtype, name="fc3")(h)
            y = rearrange(constrain(y, "batch", "seq", "act"), "b (r c) d -> b r c d", r=grid[0])
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))


def build(section, depth: int, dtype: str) -> Projector:
    """The submodule "projector" of a network of `depth` layers; to be called in its compact method."""
    if section is None:
        raise config.ConfigError("model.projector is missing: a section such as {'layer': 8, 'features': 768}")
    fields = config.check(Projector, section, "model.projector", given=("parent", "name", "dtype"))
    if not 1 <= fields["layer"] <= depth:
        raise config.ConfigError(f"model.projector.layer = {fields['layer']}; valid: 1 to {depth}")
    return config.refuse_unread(Projector(**fields, dtype=dtype, name=L.PROJECTOR), section, "model.projector")
