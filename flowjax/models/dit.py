"""DiT: a transformer over image patches, conditioned on time and class (2212.09748; the same network is SiT, 2401.08740).

Our t in [0, 1] (0 = data) stands for the paper's step 0..999 through `time_scale`. Options `norm`, `mlp`, `rope` and `qk_norm`
turn it into the modern block of LightningDiT (2501.01423). Layers are stacked on a leading "layers" axis and scanned, so that
compile time does not grow with depth.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from flowjax.conditions import need
from flowjax.config import ConfigError, lookup
from flowjax.models import layers as L
from flowjax.models import projector as projectors
from flowjax.models.attention import LAYOUT, attention, show
from flowjax.models.remat import ATTENTION, BLOCK, REMAT
from flowjax.models.sharding import constrain
from flowjax.models.stack import stack

CONDITIONINGS = ("adaln_zero", "adaln", "in_context", "cross_attention")
NORMS = ("layer", "rms")
MLPS = {"gelu": L.GeluMLP, "swiglu": L.SwiGLU}
EPS = 1e-6


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) -> (B, N, patch * patch * C): patches row by row, each read as (row, column, channel)."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify` for an image of height x width pixels."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", p=patch, q=patch, h=height // patch, w=width // patch)


def modulation(c: jax.Array, parts: int, width: int, zero: bool, dtype: str, name: str) -> list[jax.Array]:
    """`parts` float32 vectors (B, width) regressed from c (B, width): Linear(SiLU(c)), cut in order."""
    init = L.zeros if zero else L.xavier
    m = L.Linear(parts * width, ("embed", "mlp"), kernel_init=init, dtype=dtype, name=name)(nn.silu(c))
    m = constrain(m.astype(jnp.promote_types(m.dtype, jnp.float32)), "batch", "act")
    return [constrain(part, "batch", "act") for part in jnp.split(m, parts, axis=-1)]


def check_sizes(net, height: int, width: int):
    """ConfigError unless the fields patch, heads, width and remat of a network fit an image of height x width."""
    lookup(REMAT, net.remat, "model.remat")
    if height % net.patch or width % net.patch:
        raise ConfigError(f"model.patch = {net.patch} does not divide the image, {height} x {width}")
    if net.width % net.heads:
        raise ConfigError(f"model.heads = {net.heads} does not divide model.width = {net.width}")


def queries_keys_values(x, heads: int, qk_norm: bool, angles, dtype: str, prefix: str = "", context=None):
    """q of x (B, N, D), k and v of `context` (B, S, D) or of x itself, each (B, N or S, heads, head_dim); angles (N, head_dim/2)
    turn q and k after their norms."""

    def project(source, name):
        y = L.Linear(x.shape[-1], ("embed", "heads"), dtype=dtype, name=prefix + name)(source)
        return constrain(rearrange(y, "b n (h d) -> b n h d", h=heads), *LAYOUT)

    context = x if context is None else context
    q, k, v = project(x, "q"), project(context, "k"), project(context, "v")
    if qk_norm:
        q, k = (L.RMSNorm(EPS, dtype, name=f"{prefix}{name}_norm")(y) for name, y in (("q", q), ("k", k)))
    if angles is not None:
        q, k = L.rotate(q, angles), L.rotate(k, angles)
    return q, k, v


class Attention(nn.Module):
    """Multi-head attention of x (B, N, D) over `context` (B, S, D), or over x itself; angles (N, head_dim/2) turn q and k.

    mask: boolean, broadcastable to (B, heads, N, S); None for all.
    """

    heads: int
    qk_norm: bool
    implementation: str
    dtype: str

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, angles: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        q, k, v = queries_keys_values(x, self.heads, self.qk_norm, angles, self.dtype, context=context)
        show(self, q, k)
        y = attention(q, k, v, mask, self.implementation)
        y = checkpoint_name(rearrange(y, "b n h d -> b n (h d)"), ATTENTION)
        y = L.Linear(x.shape[-1], ("heads", "embed"), dtype=self.dtype, name="out")(y)
        return constrain(y, "batch", "seq", "act")


class Block(nn.Module):
    """One layer. x (B, N, D) in the compute dtype; c (B, D) float32; context (B, S, D) for cross-attention only.

    drops: a bool, where only some layers of a stack have dropout.
    """

    heads: int
    hidden: int
    conditioning: str
    norm: str
    qk_norm: bool
    mlp: str
    dropout: float
    implementation: str
    dtype: str
    train: bool  # a field, so that nothing static crosses scan and remat

    @nn.compact
    def __call__(self, x, c, context, angles, drops=None):
        x = checkpoint_name(x, BLOCK)
        adaptive, gated = self.conditioning in ("adaln_zero", "adaln"), self.conditioning == "adaln_zero"

        def norm(h, name):
            return L.RMSNorm(EPS, name=name)(h) if self.norm == "rms" else L.LayerNorm(EPS, not adaptive, name=name)(h)

        def branch(name, layer, shift=None, scale=None, gate=None, **inputs):
            h = norm(x, f"{name}_norm")
            h = h if shift is None else L.modulate(h, shift, scale)
            h = layer(name=name)(h.astype(self.dtype), **inputs)
            dropped = nn.Dropout(self.dropout, name=f"{name}_dropout")(h, deterministic=not self.train)
            h = dropped if drops is None else jnp.where(drops, dropped, h)
            h = h if gate is None else gate[:, None] * h
            return constrain((x + h).astype(self.dtype), "batch", "seq", "act")

        attend = functools.partial(Attention, self.heads, self.qk_norm, self.implementation, self.dtype)
        # Order of the paper's code: (shift, scale, gate) of the attention, then of the MLP.
        n = (3 if gated else 2) if adaptive else 0
        vectors = modulation(c, 2 * n, x.shape[-1], gated, self.dtype, "adaln") if adaptive else []

        x = branch("attn", attend, *vectors[:n], angles=angles)
        if self.conditioning == "cross_attention":
            x = branch("cross", attend, context=context)
        x = branch("mlp", functools.partial(MLPS[self.mlp], self.hidden, self.dtype), *vectors[n:])
        return x, None


class Head(nn.Module):
    """Final norm (modulated by c where the conditioning is adaptive) and zero-initialised Linear to `features`, float32."""

    features: int
    conditioning: str
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, x, c):
        adaptive = self.conditioning in ("adaln_zero", "adaln")
        h = L.RMSNorm(EPS, name="norm")(x) if self.norm == "rms" else L.LayerNorm(EPS, not adaptive, name="norm")(x)
        if adaptive:
            h = L.modulate(h, *modulation(c, 2, x.shape[-1], self.conditioning == "adaln_zero", self.dtype, "adaln"))
        return L.Linear(self.features, ("embed", "small"), kernel_init=L.zeros, name="linear")(h)


class DiT(nn.Module):
    """Diffusion transformer for channel-last images or latents of any height and width that `patch` divides.

    Fields:
      depth, width, heads, patch, mlp_ratio: sizes; the MLP's hidden size is mlp_ratio * width, times 2/3 for "swiglu".
      num_classes: rows of the label table less the extra one for "no class"; 0 for no labels at all.
      conditioning: how time and class enter: "adaln_zero" (default, best), "adaln", "in_context" (as extra tokens),
        "cross_attention" (to a sequence of the two).
      norm: "layer" (no affine under adaLN) or "rms" (learned scale).   qk_norm: RMS norm of queries and keys per head.
      mlp: "gelu" or "swiglu".   rope: axial rotary positions.   sincos: the fixed position table.
      out_channels: 0 for as many as the input has.
      learn_sigma: a head with twice the channels, as the papers' models have. The first half is returned and the second
        (the log-variance) discarded, as SiT does, unless return_sigma.
      dropout: on the output of each branch, when train.
      guidance_embed: the scale of guidance is an input, cond["guidance"], embedded as time is and added to it: for networks that
        are distilled from guided ones.
      step_embed: so is the step that the velocity is the average over, cond["step"], 0 where that is not given: for flow maps.
      time_scale, frequency_shift: of the timestep embedding; (1000, 0) is DiT, (1, 0) SiT, (1000, 1) diffusers' DiT.
      dtype: "float32" or "bfloat16", of matrix products and the residual stream.
      remat: what the backward pass keeps, see `flowjax.models.remat`.   attention: see `flowjax.models.attention`.
      scan: stack the layers (parameters "blocks" with a leading axis) or not ("block_0", ...), or "unrolled"; see `flowjax.models.stack`.
      projector: fields of a flowjax.models.projector.Projector, whose parameters the network then has and which works only when
        `project` asks for it; None for none.
    """

    depth: int
    width: int
    heads: int
    patch: int = 2
    num_classes: int = 0
    mlp_ratio: float = 4.0
    conditioning: str = "adaln_zero"
    norm: str = "layer"
    qk_norm: bool = False
    mlp: str = "gelu"
    rope: bool = False
    sincos: bool = True
    out_channels: int = 0
    learn_sigma: bool = False
    return_sigma: bool = False
    dropout: float = 0.0
    guidance_embed: bool = False
    step_embed: bool = False
    time_scale: float = 1000.0
    frequency_shift: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool | str = True
    attention: str = "auto"
    projector: Mapping | None = None

    kind = "denoiser"
    presets = {
        f"{size}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch": patch}
        for size, depth, width, heads in (("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16))
        for patch in (2, 4, 8)
    } | {
        # 2501.01423, on 16x16 latents of 32 channels.
        "LightningXL/1": {
            "depth": 28, "width": 1152, "heads": 16, "patch": 1, "norm": "rms", "mlp": "swiglu", "rope": True,
        }
    }

    @property
    def hidden(self) -> int:
        """Hidden size of the MLP."""
        return int(self.mlp_ratio * self.width * (2 / 3 if self.mlp == "swiglu" else 1))

    @property
    def has_null(self) -> bool:
        """Whether there is a condition to leave out."""
        return bool(self.num_classes)

    def null(self, cond):
        """The condition that means "no class": every label replaced by the extra row of the table."""
        return {**cond, "label": jnp.full_like(cond["label"], self.num_classes)} if self.num_classes else cond

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: dict, train: bool = False, project: bool = False):
        """Prediction (B, H, W, out_channels) float32 for x (B, H, W, C), t (B,) in [0, 1].

        cond: "label" int (B,) where there are classes, "guidance" (B,) with guidance_embed, "step" (B,) with step_embed. With
        `project`, the pair of the prediction and the projector's (B, H / patch, W / patch, features).
        """
        _, height, width, channels = x.shape
        self._check(height, width)
        out_channels = (self.out_channels or channels) * (2 if self.learn_sigma else 1)

        embeddings = [L.embed_time(self, t, cond, self.frequency_shift)]
        if self.num_classes:
            label = need(cond, "label", f"a DiT with num_classes = {self.num_classes}")
            embeddings.append(L.Embed(self.num_classes + 1, self.width, name="y_embed")(label))
        c = constrain(sum(embeddings), "batch", "act")
        context = constrain(jnp.stack(embeddings, axis=1).astype(self.dtype), "batch", "seq", "act")

        h = L.Linear(self.width, ("small", "embed"), dtype=self.dtype, name="x_embed")(patchify(x, self.patch))
        grid = height // self.patch, width // self.patch
        if self.sincos:
            h = h + jnp.asarray(L.sincos_2d(self.width, *grid), jnp.float32)
        h = constrain(h.astype(self.dtype), "batch", "seq", "act")
        angles = None
        if self.rope:
            angles = jnp.asarray(L.rope_2d(self.width // self.heads, *map(range, grid)), jnp.float32)
        if self.conditioning == "in_context":
            extra = context.shape[1]
            h = constrain(jnp.concatenate([h, context], axis=1), "batch", "seq", "act")
            if angles is not None:  # the extra tokens have no place in the image: angle 0
                angles = jnp.pad(angles, ((0, extra), (0, 0)))

        fields = (self.heads, self.hidden, self.conditioning, self.norm, self.qk_norm, self.mlp, self.dropout)
        fields += (self.attention, self.dtype, train)
        wanted = project or (self.projector is not None and self.is_initializing())
        projector = projectors.build(self.projector, self.depth, self.dtype) if wanted else None
        taps = projector.layers if wanted else ()
        h, kept = stack(Block, fields, self.depth, scan=self.scan, remat=self.remat, taps=taps)(h, c, context, angles)
        projection = projector({k: v[:, : grid[0] * grid[1]] for k, v in kept.items()}, grid) if wanted else None
        if self.conditioning == "in_context":
            h = h[:, :-extra]
        y = Head(self.patch**2 * out_channels, self.conditioning, self.norm, self.dtype, name="final")(h, c)
        y = unpatchify(constrain(y, "batch", "seq", "act"), self.patch, height, width)
        y = y[..., : out_channels // 2] if self.learn_sigma and not self.return_sigma else y
        return (y, projection) if project else y

    def _check(self, height: int, width: int):
        lookup(dict.fromkeys(CONDITIONINGS), self.conditioning, "model.conditioning")
        lookup(dict.fromkeys(NORMS), self.norm, "model.norm")
        lookup(MLPS, self.mlp, "model.mlp")
        check_sizes(self, height, width)
        if self.return_sigma and not self.learn_sigma:
            raise ConfigError("model.return_sigma needs model.learn_sigma")
