"""MMDiT: text and image tokens as two streams with weights of their own and one attention (SD3, 2403.03206, section 4).

Covers SD3 and SD3.5 (query-key norm; medium's second attention over the image alone) and is meant for small text-to-image
models as well, which learn their text encoder along (`text_encoder`). As there, t = 1 is noise and the published weights
predict z - x, which is our "velocity"; their time step is 1000 t.

Padding of the text is a token like any other (no mask), as in SD3: a network sees the length of text it was trained with.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from flowjax.conditions import CAPTION, need
from flowjax.config import ConfigError, lookup
from flowjax.models import layers as L
from flowjax.models import projector as projectors
from flowjax.models.attention import LAYOUT, attention, show
from flowjax.models.dit import EPS, Attention, Head, check_sizes, modulation, patchify, queries_keys_values, unpatchify
from flowjax.models.remat import ATTENTION, BLOCK
from flowjax.models.sharding import constrain
from flowjax.models.stack import stack
from flowjax.models.text import encoder_of

POSITIONS = ("cropped", "table", "rope")
EMBED = L.normal(0.02)


def grid_sincos(width: int, rows: Sequence[float], columns: Sequence[float]) -> jax.Array:
    """`layers.sincos_2d` at places that need not be whole numbers: (len(rows) * len(columns), width) float32.

    The program holds one row and one column, not the grid that they span.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = (np.asarray(places)[:, None] * frequencies for places in (rows, columns))
    row, column = (jnp.asarray(np.concatenate([np.sin(a), np.cos(a)], axis=1), jnp.float32) for a in angles)
    shape = len(rows), len(columns), width // 2
    halves = jnp.broadcast_to(column, shape), jnp.broadcast_to(row[:, None], shape)
    return jnp.concatenate(halves, axis=-1).reshape(-1, width)


def normed(x: jax.Array, shift: jax.Array, scale: jax.Array, dtype: str) -> jax.Array:
    """LayerNorm without parameters, modulated in float32: the input of every branch, in the compute dtype."""
    return L.modulate(L.LayerNorm(EPS, False)(x), shift, scale).astype(dtype)


class JointAttention(nn.Module):
    """One softmax over text (B, S, D) and image (B, N, D); angles (N, head_dim/2) turn the image's q and k, the text is at 0.

    With `image_only` the text is read and not written: its query exists, because published weights have it, and is not used.
    """

    heads: int
    qk_norm: bool
    image_only: bool
    implementation: str
    dtype: str

    @nn.compact
    def __call__(self, text, image, angles):
        width, length = image.shape[-1], text.shape[1]
        of_text = queries_keys_values(text, self.heads, self.qk_norm, None, self.dtype, "text_")
        of_image = queries_keys_values(image, self.heads, self.qk_norm, angles, self.dtype, "image_")
        show(self, *of_image[:2])
        q, k, v = (constrain(jnp.concatenate(pair, axis=1), *LAYOUT) for pair in zip(of_text, of_image, strict=True))
        y = attention(of_image[0] if self.image_only else q, k, v, implementation=self.implementation)
        y = checkpoint_name(rearrange(y, "b n h d -> b n (h d)"), ATTENTION)

        def out(y, name):
            y = L.Linear(width, ("heads", "embed"), dtype=self.dtype, name=name)(constrain(y, "batch", "seq", "act_heads"))
            return constrain(y, "batch", "seq", "act")

        if self.image_only:
            return None, out(y, "image_out")
        return out(y[:, :length], "text_out"), out(y[:, length:], "image_out")


class JointBlock(nn.Module):
    """One layer on the streams (text (B, S, D), image (B, N, D)) in the compute dtype; c (B, D) float32; angles or None.

    dual: a second attention of the image over itself (SD3.5 medium).   image_only: the last layer, which ends the text.
    """

    heads: int
    hidden: int
    qk_norm: bool
    dual: bool
    image_only: bool
    dropout: float
    implementation: str
    dtype: str
    train: bool  # a field, so that nothing static crosses scan and remat

    @nn.compact
    def __call__(self, streams, c, angles):
        text, image = (checkpoint_name(h, BLOCK) for h in streams)
        width = image.shape[-1]

        def add(h, gate, branch, name):
            branch = nn.Dropout(self.dropout, name=f"{name}_dropout")(branch, deterministic=not self.train)
            return constrain((h + gate[:, None] * branch).astype(self.dtype), "batch", "seq", "act")

        def mlp(h, shift, scale, gate, name):
            return add(h, gate, L.GeluMLP(self.hidden, self.dtype, name=name)(normed(h, shift, scale, self.dtype)), name)

        # (shift, scale, gate) of the attention, of the MLP, of the second attention.
        of_image = modulation(c, 9 if self.dual else 6, width, True, self.dtype, "image_adaln")
        of_text = modulation(c, 2 if self.image_only else 6, width, True, self.dtype, "text_adaln")

        attend = JointAttention(self.heads, self.qk_norm, self.image_only, self.implementation, self.dtype, name="attn")
        from_text, from_image = attend(normed(text, *of_text[:2], self.dtype), normed(image, *of_image[:2], self.dtype), angles)
        again = normed(image, *of_image[6:8], self.dtype) if self.dual else None
        image = add(image, of_image[2], from_image, "image_attn")
        if self.dual:
            second = Attention(self.heads, self.qk_norm, self.implementation, self.dtype, name="second_attn")
            image = add(image, of_image[8], second(again, angles=angles), "image_second")
        image = mlp(image, *of_image[3:6], "image_mlp")
        if not self.image_only:
            text = add(text, of_text[2], from_text, "text_attn")
            text = mlp(text, *of_text[3:6], "text_mlp")
        return (text, image), None


class Pooled(nn.Module):
    """One vector (B, P) for the whole text -> (B, features) float32: Linear, SiLU, Linear."""

    features: int

    @nn.compact
    def __call__(self, x):
        h = nn.silu(L.Linear(self.features, ("embed", "mlp"), EMBED, name="fc1")(x))
        return L.Linear(self.features, ("mlp", "embed"), EMBED, name="fc2")(h)


def empty(cond: Mapping) -> dict:
    """The condition of an empty prompt: token ids and embeddings all zero, the rest as it is."""
    return {k: jnp.zeros_like(v) if k in CAPTION else v for k, v in cond.items()}


class MMDiT(nn.Module):
    """Text-to-image transformer for channel-last images or latents of any height and width that `patch` divides.

    Fields:
      depth, width, heads, patch, mlp_ratio: sizes.   dual: as many of the first layers have a second attention over the image.
      qk_norm: RMS norm of queries and keys per head.
      positions: of the image's tokens; the text's have none. "cropped": the middle of a sin-cos table of table x table places
        whose coordinates run from 0 to `base`, so that images of every size and aspect share their centre (SD3; `table` is
        the largest side in patches).   "table": that table as a parameter without gradient, for published weights, which
        bring their own.   "rope": rotary in (row, column) from the upper left corner, as FLUX, any size.
      text_encoder: fields of a `flowjax.models.text.TextTransformer`, which is trained along (parameters "encoder") and fed with
        cond["tokens"]; None for embedded text, cond["text"] and cond["pooled"].
      out_channels: 0 for as many as the input has.   dropout: on the output of each branch, when train.
      guidance_embed, step_embed: as in `DiT`.   time_scale: of the timestep embedding.
      dtype, remat, attention: as in `DiT`.
      scan: stack layers of a kind (parameters "dual_blocks", "blocks"; the last one is of its own kind), not, or "unrolled"; see `flowjax.models.stack`.
      projector: as in `DiT`, of the image's tokens.
    """

    depth: int
    width: int
    heads: int
    patch: int = 2
    mlp_ratio: float = 4.0
    dual: int = 0
    qk_norm: bool = False
    positions: str = "cropped"
    table: int = 192
    base: int = 64
    text_encoder: Mapping | None = None
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
    has_null = True
    presets = {
        "sd3_medium": {"depth": 24, "width": 1536, "heads": 24},
        "sd35_medium": {"depth": 24, "width": 1536, "heads": 24, "qk_norm": True, "dual": 13, "table": 384},
        "sd35_large": {"depth": 38, "width": 2432, "heads": 38, "qk_norm": True},
    }

    def null(self, cond):
        """The condition of an empty prompt: zeros for token ids (all padding) and for embeddings (what SD3 is trained with)."""
        return empty(cond)

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Mapping, train: bool = False, project: bool = False):
        """Prediction (B, H, W, out_channels) float32 for x (B, H, W, C) and t (B,) in [0, 1].

        cond: "tokens" int (B, L) with a text encoder, else "text" (B, S, any size) and "pooled" (B, any size); with
        guidance_embed also "guidance" (B,). With `project`, the pair of the prediction and the projector's (B, H / patch,
        W / patch, features).
        """
        _, height, width, channels = x.shape
        grid = height // self.patch, width // self.patch
        self._check(height, width)

        text, pooled = self._text(cond)
        c = L.embed_time(self, t, cond) + Pooled(self.width, name="pooled_embed")(pooled)
        c = constrain(c, "batch", "act")
        text = L.Linear(self.width, ("small", "embed"), dtype=self.dtype, name="text_embed")(text)
        text = constrain(text, "batch", "seq", "act")

        image = L.Linear(self.width, ("small", "embed"), dtype=self.dtype, name="x_embed")(patchify(x, self.patch))
        angles = None
        if self.positions == "rope":
            angles = jnp.asarray(L.rope_2d(self.width // self.heads, *map(range, grid)), jnp.float32)
        else:
            image = image + self._places(*grid)
        image = constrain(image.astype(self.dtype), "batch", "seq", "act")

        wanted = project or (self.projector is not None and self.is_initializing())
        projector = projectors.build(self.projector, self.depth, self.dtype) if wanted else None
        image, kept = self._layers(train, projector.layers if wanted else (), (text, image), c, angles)
        projection = projector(kept, grid) if wanted else None
        y = Head(self.patch**2 * (self.out_channels or channels), "adaln_zero", "layer", self.dtype, name="final")(image, c)
        y = unpatchify(constrain(y, "batch", "seq", "act"), self.patch, height, width)
        return (y, projection) if project else y

    def _text(self, cond):
        """(sequence (B, S, any size), pooled (B, any size))."""
        if self.text_encoder is None:
            return need(cond, "text", "an MMDiT without a text_encoder"), need(cond, "pooled", "an MMDiT without a text_encoder")
        return encoder_of(self)(need(cond, "tokens", "an MMDiT with a text_encoder"))

    def _places(self, rows: int, columns: int) -> jax.Array:
        """Position vectors (rows * columns, width) float32: the middle of the table."""
        row, column = ((self.table - n) // 2 + np.arange(n) for n in (rows, columns))
        if self.positions == "table":
            every = np.arange(self.table)
            fill = lambda *_: grid_sincos(self.width, self.base / self.table * every, self.base / self.table * every)  # noqa: E731
            held = L.Embed(self.table**2, self.width, (None, "embed"), fill, name="positions")
            return jax.lax.stop_gradient(held((row[:, None] * self.table + column).ravel()))
        return grid_sincos(self.width, self.base / self.table * row, self.base / self.table * column)

    def _layers(self, train, taps, streams, c, angles):
        """The image's tokens after all layers and {layer: those after it} for `taps`."""
        last, images = self.depth - 1, {}
        for name, first, end, dual in (
            ("dual_blocks", 0, self.dual, True),
            ("blocks", self.dual, last, False),
            ("", last, self.depth, False),
        ):
            if first == end:
                continue
            fields = self.heads, int(self.mlp_ratio * self.width), self.qk_norm, dual, first == last
            fields += self.dropout, self.attention, self.dtype, train
            how = {"name": name, "first": first, "scan": self.scan and first < last, "remat": self.remat, "taps": taps}
            streams, kept = stack(JointBlock, fields, end - first, **how)(streams, c, angles)
            images |= {layer: image for layer, (_, image) in kept.items()}
        return streams[1], images

    @property
    def unread(self) -> dict[str, str]:
        """Fields that do nothing beside the others, and why."""
        return dict.fromkeys(("table", "base"), "with model.positions = 'rope'") if self.positions == "rope" else {}

    def _check(self, height: int, width: int):
        lookup(dict.fromkeys(POSITIONS), self.positions, "model.positions")
        check_sizes(self, height, width)
        if self.width % 4:
            raise ConfigError(f"model.width = {self.width} must be divisible by 4")
        if not 0 <= self.dual < self.depth:
            raise ConfigError(f"model.dual = {self.dual} must be less than model.depth = {self.depth}: the last layer has none")
        if self.positions != "rope" and max(height, width) > self.table * self.patch:
            raise ConfigError(
                f"model.table = {self.table} patches of {self.patch} are less than the image, {height} x {width};"
                " enlarge it or use model.positions = 'rope'"
            )
