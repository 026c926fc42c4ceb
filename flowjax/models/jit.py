"""JiT: a plain transformer on large patches of pixels, without an autoencoder (2511.13720).

A patch of 16 x 16 pixels has 768 numbers, one of 32 x 32 has 3072. A network narrower than that cannot pass noise through, and
need not: it predicts the clean image, which lies near a low-dimensional manifold (`prediction` "x"), while the loss is that of
the velocity (`weight` "velocity"). Patches enter through a bottleneck; the condition enters through adaLN and, from a middle
layer on, as tokens of its own. Time runs the other way in the paper: its t is our 1 - t.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.conditions import need
from flowjax.config import ConfigError
from flowjax.models import layers as L
from flowjax.models import projector as projectors
from flowjax.models.dit import Block, Head, check_sizes, patchify, unpatchify
from flowjax.models.sharding import constrain
from flowjax.models.stack import stack
from flowjax.models.text import encoder_of


class JiT(nn.Module):
    """Diffusion transformer for channel-last images of any height and width that `patch` divides.

    Its layers are DiT's with RMS norms, norms of queries and keys, SwiGLU, rotary positions beside the fixed table, and adaLN-zero.

    Fields:
      depth, width, heads, patch, mlp_ratio: sizes, as in `flowjax.models.dit.DiT`.
      bottleneck: rank of the patch embedding.
      num_classes: rows of the label table less the extra one for "no class"; 0 for no labels.
      class_tokens: how many tokens the label's embedding becomes, told apart by a learned position each.
      text_encoder: fields of a `flowjax.models.text.TextTransformer` that is trained along (parameters "encoder") and fed with
        cond["tokens"]; its sequence becomes tokens, its pooled vector is added to the time's. None for none.
      context_from: as many layers see the image alone; the tokens of the condition join it after them.
      dropout: on the output of each branch in the middle half of the layers, when train.
      out_channels, guidance_embed, step_embed, time_scale, dtype, remat, attention, projector: as in DiT.
      scan: stack the layers before and after the tokens join (parameters "blocks", "context_blocks"), not, or "unrolled"; see `flowjax.models.stack`.
    """

    depth: int
    width: int
    heads: int
    patch: int = 16
    bottleneck: int = 128
    num_classes: int = 0
    class_tokens: int = 32
    text_encoder: Mapping | None = None
    context_from: int = 4
    mlp_ratio: float = 4.0
    out_channels: int = 0
    dropout: float = 0.0
    guidance_embed: bool = False
    step_embed: bool = False
    time_scale: float = 1000.0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool | str = True
    attention: str = "auto"
    projector: Mapping | None = None

    kind = "denoiser"
    presets = {
        f"{size}/{patch}": {
            "depth": depth, "width": width, "heads": heads, "bottleneck": bottleneck, "context_from": start, "patch": patch,
        }
        for size, depth, width, heads, bottleneck, start in (
            ("B", 12, 768, 12, 128, 4), ("L", 24, 1024, 16, 128, 8), ("H", 32, 1280, 16, 256, 10),
        )
        for patch in (16, 32)
    }  # fmt: skip

    @property
    def has_null(self) -> bool:
        """Whether there is a condition that can be left out."""
        return bool(self.num_classes or self.text_encoder)

    @property
    def unread(self) -> dict[str, str]:
        """Fields that do nothing beside the others, and why."""
        found = {} if self.num_classes else {"class_tokens": "without model.num_classes"}
        return found | ({} if self.has_null else {"context_from": "without model.num_classes or model.text_encoder"})

    def null(self, cond):
        """The empty condition: the extra row of the label table, a prompt that is all padding."""
        empty = {"label": jnp.full_like(cond["label"], self.num_classes)} if self.num_classes else {}
        empty |= {"tokens": jnp.zeros_like(cond["tokens"])} if self.text_encoder else {}
        return {**cond, **empty}

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Mapping, train: bool = False, project: bool = False):
        """Prediction (B, H, W, out_channels) float32 for x (B, H, W, C) and t (B,) in [0, 1].

        cond: "label" int (B,) where there are classes, "tokens" int (B, L) where there is a text encoder, "guidance" (B,) with
        guidance_embed, "step" (B,) with step_embed.
        With `project`, the pair of the prediction and the projector's (B, H / patch, W / patch, features).
        """
        _, height, width, channels = x.shape
        self._check(height, width)
        grid = height // self.patch, width // self.patch
        count = grid[0] * grid[1]

        vector, context = self._condition(cond)
        c = constrain(L.embed_time(self, t, cond) + vector, "batch", "act")
        h = L.Linear(self.bottleneck, ("small", "mlp"), bias=False, dtype=self.dtype, name="x_bottleneck")(patchify(x, self.patch))
        h = L.Linear(self.width, ("mlp", "embed"), dtype=self.dtype, name="x_embed")(constrain(h, "batch", "seq", "act_mlp"))
        h = h + jnp.asarray(L.sincos_2d(self.width, *grid), jnp.float32)
        h = constrain(h.astype(self.dtype), "batch", "seq", "act")
        angles = jnp.asarray(L.rope_2d(self.width // self.heads, *map(range, grid)), jnp.float32)

        wanted = project or (self.projector is not None and self.is_initializing())
        projector = projectors.build(self.projector, self.depth, self.dtype) if wanted else None
        taps = projector.layers if wanted else ()

        alone = self.depth if context is None else self.context_from
        h, kept = self._layers("blocks", 0, alone, train, taps)(h, c, None, angles)
        if context is not None:
            h = constrain(jnp.concatenate([h, context.astype(self.dtype)], axis=1), "batch", "seq", "act")
            angles = jnp.pad(angles, ((0, context.shape[1]), (0, 0)))  # these tokens have no place in the image: angle 0
            h, later = self._layers("context_blocks", alone, self.depth - alone, train, taps)(h, c, None, angles)
            h, kept = h[:, :count], kept | {k: v[:, :count] for k, v in later.items()}
        projection = projector(kept, grid) if wanted else None

        y = Head(self.patch**2 * (self.out_channels or channels), "adaln_zero", "rms", self.dtype, name="final")(h, c)
        y = unpatchify(constrain(y, "batch", "seq", "act"), self.patch, height, width)
        return (y, projection) if project else y

    def _condition(self, cond):
        """(vector to add to the time's (B, width) or 0, tokens (B, S, width) or None), float32."""
        vector, context = 0.0, []
        if self.num_classes:
            label = need(cond, "label", f"a JiT with num_classes = {self.num_classes}")
            label = L.Embed(self.num_classes + 1, self.width, name="y_embed")(label)
            places = L.Embed(self.class_tokens, self.width, name="y_positions")(jnp.arange(self.class_tokens))
            vector = vector + label
            context.append(label[:, None] + places)
        if self.text_encoder:
            sequence, pooled = encoder_of(self)(need(cond, "tokens", "a JiT with a text_encoder"))
            vector = vector + L.Linear(self.width, ("small", "embed"), L.normal(0.02), name="pooled_embed")(pooled)
            context.append(L.Linear(self.width, ("small", "embed"), name="text_embed")(sequence))
        return vector, constrain(jnp.concatenate(context, axis=1), "batch", "seq", "act") if context else None

    def _layers(self, name: str, first: int, length: int, train: bool, taps: tuple):
        """The stack of the layers first .. first + length - 1."""
        fields = self.heads, int(self.mlp_ratio * self.width * 2 / 3), "adaln_zero", "rms", True, "swiglu", self.dropout
        fields += self.attention, self.dtype, train
        drops = None
        if train and self.dropout:
            number = jnp.arange(first, first + length)
            drops = (self.depth // 4 <= number) & (number < self.depth // 4 * 3)
        return stack(Block, fields, length, name=name, first=first, scan=self.scan, remat=self.remat, taps=taps, each=drops)

    def _check(self, height: int, width: int):
        check_sizes(self, height, width)
        if self.has_null and not 1 <= self.context_from < self.depth:
            raise ConfigError(f"model.context_from = {self.context_from}; valid: 1 to model.depth - 1 = {self.depth - 1}")
