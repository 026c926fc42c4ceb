"""The layers that every network here is made of.

Parameters are float32 and carry logical axis names (see `sharding`); matrix products run in `dtype`; statistics of norms,
sinusoids and modulation are float32. Nothing relies on a library default: epsilons, paddings and initialisers are written out
where a network is defined, because torch, flax and the papers disagree on all three.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flowjax.conditions import need
from flowjax.config import ConfigError
from flowjax.models.half import half_dot
from flowjax.models.remat import LINEAR
from flowjax.models.sharding import active_mesh, constrain

zeros = nn.initializers.zeros
ones = nn.initializers.ones
xavier = nn.initializers.xavier_uniform()
lecun = nn.initializers.lecun_normal()

GUIDANCE = "g_embed"  # the parameters of an embedded scale of guidance
STEP = "s_embed"  # and of an embedded step
PROJECTOR = "projector"  # and of the head that reads a hidden state
REWARD = ("head", "asked")  # and of what a reward model adds to its backbone
ADDED = (GUIDANCE, STEP, PROJECTOR, *REWARD)  # what a network may have that the one it begins as has not


def normal(std: float) -> Callable:
    """Initialiser N(0, std^2)."""
    return nn.initializers.normal(std)


def _param(module: nn.Module, name: str, init: Callable, axes: Sequence[str | None], shape: Sequence[int]) -> jax.Array:
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape), jnp.float32)


def matmul(x: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """x (..., in) @ float32 kernel (in, out), computed and returned in `dtype`; the kernel's gradient is float32 all the way (see `half`)."""
    x, lead = x.astype(dtype), x.shape[:-1]
    # With one axis to sum over, the kernel's gradient needs no transposed copy of the cotangent (a quarter of the time of a
    # DiT's gradient on CPUs). Rows and tokens cannot be one axis where tokens are split as well.
    if (mesh := active_mesh()) is None or mesh.shape.get("context", 1) == 1:
        x = x.reshape(-1, x.shape[-1])
    if dtype in ("bfloat16", "float16"):
        y = half_dot(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), dtype, dtype)
    else:
        y = x @ kernel.astype(dtype)
    return y.reshape(*lead, kernel.shape[1])


class Linear(nn.Module):
    """y = x W + b on the last axis; W is (in, features) with logical axes `axes`, b has the last of them."""

    features: int
    axes: tuple = ("embed", "mlp")
    kernel_init: Callable = xavier
    bias: bool = True
    bias_init: Callable = zeros
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _param(self, "kernel", self.kernel_init, self.axes, (x.shape[-1], self.features))
        y = matmul(x, kernel, self.dtype)
        if self.bias:
            y = y + _param(self, "bias", self.bias_init, self.axes[-1:], (self.features,)).astype(self.dtype)
        return checkpoint_name(y, LINEAR)


class Conv(nn.Module):
    """Convolution of channel-last input (B, *space, C) with a kernel (*kernel, C / groups, features).

    `padding` is one (before, after) pair per spatial axis: torch, TensorFlow and the papers pad stride-2 convolutions
    differently, so a network states what it means.
    """

    features: int
    kernel: tuple = (3, 3)
    stride: int = 1
    padding: tuple = ((1, 1), (1, 1))
    groups: int = 1
    axes: tuple = ("conv_in", "conv_out")
    kernel_init: Callable = lecun
    bias: bool = True
    bias_init: Callable = zeros
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rank = len(self.kernel)
        shape = (*self.kernel, x.shape[-1] // self.groups, self.features)
        kernel = _param(self, "kernel", self.kernel_init, (None,) * rank + tuple(self.axes), shape)
        space = "DHW"[-rank:]
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride,) * rank,
            padding=self.padding,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
            feature_group_count=self.groups,
        )
        if self.bias:
            y = y + _param(self, "bias", self.bias_init, self.axes[-1:], (self.features,)).astype(self.dtype)
        return checkpoint_name(y, LINEAR)


class Embed(nn.Module):
    """Table (rows, features) looked up by integers (...) -> (..., features), float32."""

    rows: int
    features: int
    axes: tuple = ("vocab", "embed")
    init: Callable = normal(0.02)

    @nn.compact
    def __call__(self, index: jax.Array) -> jax.Array:
        return jnp.take(_param(self, "embedding", self.init, self.axes, (self.rows, self.features)), index, axis=0)


def _float32(x: jax.Array) -> jax.Array:
    """x in float32, or float64 where x already has it (tests)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) over the last axis, in float32; with `affine`, scale and bias are learned."""

    eps: float
    affine: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _float32(x)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            y = y * _param(self, "scale", ones, ("norm",), x.shape[-1:]) + _param(self, "bias", zeros, ("norm",), x.shape[-1:])
        return y.astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a learned scale over the last axis, in float32."""

    eps: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _float32(x)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * _param(self, "scale", ones, ("norm",), x.shape[-1:])).astype(self.dtype)


class GroupNorm(nn.Module):
    """Normalises (B, *space, C) over space and each of `groups` groups of neighbouring channels, in float32; affine."""

    groups: int
    eps: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ConfigError(f"GroupNorm of {channels} channels in {self.groups} groups: the groups must divide the channels")

        def mean(v):
            """Over each group, for each of its channels: (B, 1 ..., C). Over space first, which leaves the large array in the
            shape it has: with channels cut in groups, its last axis is too short for wide registers."""
            groups = jnp.mean(v, axis=tuple(range(1, v.ndim - 1))).reshape(-1, self.groups, channels // self.groups)
            each = jnp.broadcast_to(jnp.mean(groups, axis=2, keepdims=True), groups.shape)
            return each.reshape(v.shape[0], *(1,) * (v.ndim - 2), channels)

        y = _float32(x)
        y = y - mean(y)
        y = y * jax.lax.rsqrt(mean(jnp.square(y)) + self.eps)
        y = y * _param(self, "scale", ones, ("norm",), (channels,)) + _param(self, "bias", zeros, ("norm",), (channels,))
        return y.astype(self.dtype)


def timestep_embedding(
    t: jax.Array, dim: int, order: str = "cos_sin", shift: float = 0.0, scale: float = 1000.0, max_period: float = 10000.0
) -> jax.Array:
    """Sinusoids of scale * t with frequencies max_period^(-i / (dim/2 - shift)), i = 0 .. dim/2 - 1.

    t is (B,); returns (B, dim) float32, cosines first for "cos_sin" (DiT, ADM) or sines first for "sin_cos" (DDPM). The
    U-Net of DDPM and diffusers' DiT use shift 1. Networks trained on steps 0..999 see scale = 1000 times our t in [0, 1].
    """
    if dim % 2:
        raise ConfigError(f"timestep embedding of odd size {dim}; it must be even")
    if order not in ("cos_sin", "sin_cos"):
        raise ConfigError(f"order of the timestep embedding is {order!r}; valid: cos_sin, sin_cos")
    half = dim // 2
    t = _float32(jnp.asarray(t))
    frequencies = jnp.asarray(max_period ** (-np.arange(half) / (half - shift)), t.dtype)
    angles = scale * t[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(parts if order == "cos_sin" else parts[::-1], axis=-1)


class TimeEmbed(nn.Module):
    """Timestep t (B,) -> (B, features) float32: sinusoids of size `dim`, Linear, SiLU, Linear.

    last_init: of the second matrix, where it is not that of the first.
    """

    features: int
    dim: int = 256
    order: str = "cos_sin"
    shift: float = 0.0
    scale: float = 1000.0
    kernel_init: Callable = normal(0.02)
    last_init: Callable | None = None

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        h = timestep_embedding(t, self.dim, self.order, self.shift, self.scale)
        h = nn.silu(Linear(self.features, ("small", "mlp"), self.kernel_init, name="fc1")(h))
        return Linear(self.features, ("mlp", "embed"), self.last_init or self.kernel_init, name="fc2")(h)


def embed_time(network: nn.Module, t: jax.Array, cond: Mapping, shift: float = 0.0) -> jax.Array:
    """Vector (B, width) float32 of t (B,) and, where the network has guidance_embed, of the scale cond["guidance"] (B,), and where it
    has step_embed, of cond["step"] (B,), which is 0 where nobody says; for its compact method.

    All are embedded alike, times the network's time_scale. The last matrix of the scale and of the step is zero at init, so that a
    network with the weights of one that lacks these inputs (all but the subtrees GUIDANCE and STEP) begins as that one, whatever they are.
    """
    c = TimeEmbed(network.width, scale=network.time_scale, shift=shift, name="t_embed")(t)
    if getattr(network, "step_embed", False):
        c = c + TimeEmbed(network.width, scale=network.time_scale, last_init=zeros, name=STEP)(cond.get("step", jnp.zeros_like(t)))
    if not network.guidance_embed:
        return c
    what = "a network with guidance_embed (sampled with guidance = {'name': 'embedded', 'scale': ...})"
    scale = need(cond, "guidance", what)
    return c + TimeEmbed(network.width, scale=network.time_scale, last_init=zeros, name=GUIDANCE)(scale)


def sincos_2d(dim: int, height: int, width: int) -> np.ndarray:
    """Fixed 2-D position table (height * width, dim), rows of the grid first, computed in float64.

    The first half of the channels encodes the COLUMN, the second the row, each as [sin, cos] of dim/4 frequencies
    10000^(-4k/dim): the convention of MAE and DiT, whose grid is built with the width first.
    """
    if dim % 4:
        raise ConfigError(f"2-D sin-cos positions need a width divisible by 4, not {dim}")
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)


def rope_2d(head_dim: int, rows: Sequence[float], columns: Sequence[float]) -> np.ndarray:
    """Angles (len(rows) * len(columns), head_dim / 2) of axial rotary positions, computed in float64.

    The first half of the pairs turns with the ROW, the second with the column (EVA-02, LightningDiT, JiT; the opposite of
    `sincos_2d`), at frequencies 10000^(-4k/head_dim). For another resolution than the trained one pass interpolated
    positions, such as np.arange(new) / new * trained.
    """
    if head_dim % 4:
        raise ConfigError(f"2-D rotary positions need a head size divisible by 4, not {head_dim}")
    frequencies = 10000.0 ** (-4 * np.arange(head_dim // 4) / head_dim)
    grid = np.meshgrid(np.asarray(rows, np.float64), np.asarray(columns, np.float64), indexing="ij")
    return np.concatenate([position.reshape(-1, 1) * frequencies for position in grid], axis=1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn each pair of neighbouring channels (2k, 2k+1) of x (B, N, heads, head_dim) by angles (N, head_dim / 2)."""
    angles = jnp.asarray(angles, jnp.promote_types(x.dtype, jnp.float32))[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., 0::2].astype(cos.dtype), x[..., 1::2].astype(cos.dtype)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift for x (B, N, D) and per-sample vectors (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class GeluMLP(nn.Module):
    """Linear to `hidden`, tanh-GELU or another activation, Linear back, for x (B, N, D)."""

    hidden: int
    dtype: str = "float32"
    activation: Callable = functools.partial(nn.gelu, approximate=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = constrain(Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1")(x), "batch", "seq", "act_mlp")
        y = Linear(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="fc2")(self.activation(h))
        return constrain(y, "batch", "seq", "act")


class SwiGLU(nn.Module):
    """(SiLU(x W1) * x W2) W3, for x (B, N, D) and hidden size `hidden` (2002.05202).

    W1 and W2 are separate matrices, not one fused, so that both can be split over columns (tensor parallelism).
    """

    hidden: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = constrain(Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="w1")(x), "batch", "seq", "act_mlp")
        value = constrain(Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="w2")(x), "batch", "seq", "act_mlp")
        y = Linear(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="w3")(nn.silu(gate) * value)
        return constrain(y, "batch", "seq", "act")
