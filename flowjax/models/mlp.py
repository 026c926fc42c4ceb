"""A small residual MLP for points in a few dimensions (2-D mixtures), with the call signature of every denoiser."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.conditions import need
from flowjax.models import layers as L
from flowjax.models.sharding import constrain


class MLP(nn.Module):
    """`depth` residual layers of SiLU units; time and label are added inside every layer. The output is zero at init.

    Fields: width and depth; num_classes (0 for no labels), whose table has one more row for "no class"; dropout on each
    layer's output when train; time_scale, the t = 1 of the sinusoids (lower than an image model's, for a map smooth in t);
    dtype of the matrix products; step_embed as in DiT.
    """

    width: int = 128
    depth: int = 3
    num_classes: int = 0
    dropout: float = 0.0
    time_scale: float = 100.0
    step_embed: bool = False
    dtype: str = "float32"

    kind = "denoiser"

    @property
    def has_null(self) -> bool:
        """Whether there is a condition to leave out."""
        return bool(self.num_classes)

    def null(self, cond):
        """The condition that means "no class": every label replaced by the extra row of the table."""
        return {**cond, "label": jnp.full_like(cond["label"], self.num_classes)} if self.num_classes else cond

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: dict, train: bool = False) -> jax.Array:
        """Prediction (B, D) float32 for x (B, D), t (B,) in [0, 1], cond {"label": int (B,)} or {}."""
        c = L.TimeEmbed(self.width, dim=64, scale=self.time_scale, kernel_init=L.lecun, name="t_embed")(t)
        if self.step_embed:
            step = cond.get("step", jnp.zeros_like(t))
            c = c + L.TimeEmbed(self.width, dim=64, scale=self.time_scale, kernel_init=L.lecun, last_init=L.zeros, name=L.STEP)(step)
        if self.num_classes:
            label = need(cond, "label", f"an MLP with num_classes = {self.num_classes}")
            c = c + L.Embed(self.num_classes + 1, self.width, init=L.normal(1.0), name="y_embed")(label)
        c = nn.silu(constrain(c, "batch", "act"))

        def linear(axes, name, init=L.lecun):
            return L.Linear(self.width, axes, kernel_init=init, dtype=self.dtype, name=name)

        h = constrain(linear(("small", "embed"), "x_embed")(x), "batch", "act")
        for i in range(self.depth):
            shift = constrain(linear(("embed", "mlp"), f"cond_{i}")(c), "batch", "act")
            y = nn.silu(constrain(linear(("embed", "mlp"), f"fc1_{i}")(nn.silu(h)) + shift, "batch", "act_mlp"))
            y = constrain(linear(("mlp", "embed"), f"fc2_{i}")(y), "batch", "act")
            h = constrain(h + nn.Dropout(self.dropout)(y, deterministic=not train), "batch", "act")
        return L.Linear(x.shape[-1], ("embed", "small"), kernel_init=L.zeros, name="out")(nn.silu(h).astype(jnp.float32))
