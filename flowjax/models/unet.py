"""The convolutional U-Net of DDPM (2006.11239, appendix B) and ADM (2105.05233, section 3).

conv -> levels down -> middle (residual, attention, residual) -> levels up -> GN, SiLU, conv. A skip is pushed after the first
convolution, after every residual(+attention) unit and after every downsampling; each level has `layers` units on the way down
and layers + 1 on the way up, each of which reads concat(h, pop()). Level 0 has the full resolution.

Our t in [0, 1] (0 = data) stands for the papers' step 0..999 through `time_scale`. The label is added to the time embedding.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.conditions import need
from flowjax.config import ConfigError, lookup
from flowjax.models.layers import Conv, Embed, GroupNorm, TimeEmbed, zeros
from flowjax.models.remat import REMAT
from flowjax.models.resblock import (
    DOWN_PADDING,
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    check_sizes,
    constrain_image,
)
from flowjax.models.sharding import constrain

RESAMPLINGS = ("conv", "resblock")
DDPM = {"layers": 2, "frequency_order": "sin_cos", "frequency_shift": 1.0, "norm_eps": 1e-6}
PRESETS = {
    "ddpm_cifar10": {**DDPM, "channels": 128, "multipliers": (1, 2, 2, 2), "attention_levels": (1,)},
    "ddpm_256": {**DDPM, "channels": 128, "multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (4,)},
    "adm_64": {
        "channels": 192,
        "multipliers": (1, 2, 3, 4),
        "layers": 3,
        "attention_levels": (1, 2, 3),
        "head_dim": 64,
        "num_classes": 1000,
        "null_class": False,
        "scale_shift": True,
        "resample": "resblock",
        "frequency_order": "cos_sin",
        "frequency_shift": 0.0,
        "norm_eps": 1e-5,
        "learn_sigma": True,
    },
}


class UNet(nn.Module):
    """U-Net for channel-last images whose sides 2^(levels - 1) divides.

    Fields:
      channels, multipliers: width of level l is channels * multipliers[l].   layers: residual blocks per level.
      attention_levels: levels with attention after every residual block; the middle always has it.
      head_dim: channels per attention head; 0 for one head of the full width.
      num_classes: rows of the label table less the one for "no class", which null_class = False leaves out (ADM has none);
        0 for no labels at all.
      scale_shift: the time modulates the second norm (ADM) instead of being added in front of it (DDPM).
      resample: "conv" (stride-2 convolution down, nearest + convolution up; DDPM) or "resblock" (2x2 mean and nearest inside
        a residual block; BigGAN, ADM).   down_padding: of the stride-2 convolution, a key of DOWN_PADDING.
      frequency_order, frequency_shift, time_scale: of the timestep embedding; DDPM is ("sin_cos", 1), ADM ("cos_sin", 0).
      groups, norm_eps: of every GroupNorm.   dropout: inside residual blocks, when train.
      out_channels, learn_sigma, return_sigma: as in `DiT`.
      dtype: "float32" or "bfloat16", of convolutions, attention and the residual stream.
      remat: what the backward pass keeps of a block, one of REMAT.   attention: see `flowjax.models.attention`.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    layers: int = 2
    attention_levels: tuple[int, ...] = (1,)
    head_dim: int = 0
    num_classes: int = 0
    null_class: bool = True
    scale_shift: bool = False
    resample: str = "conv"
    down_padding: str = "end"
    frequency_order: str = "sin_cos"
    frequency_shift: float = 1.0
    time_scale: float = 1000.0
    groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    out_channels: int = 0
    learn_sigma: bool = False
    return_sigma: bool = False
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    kind = "denoiser"
    presets = PRESETS

    @property
    def has_null(self) -> bool:
        """Whether there is a condition to leave out."""
        return bool(self.num_classes)

    def null(self, cond):
        """The condition that means "no class": every label replaced by the extra row of the table."""
        if not self.num_classes:
            return cond
        if not self.null_class:
            raise ConfigError("this U-Net was built with null_class = False: its label table has no row for 'no class'")
        return {**cond, "label": jnp.full_like(cond["label"], self.num_classes)}

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: dict, train: bool = False) -> jax.Array:
        """Prediction (B, H, W, out_channels) float32 for x (B, H, W, C), t (B,) in [0, 1], cond {"label": int (B,)} or {}."""
        self._check(x)
        out_channels = (self.out_channels or x.shape[-1]) * (2 if self.learn_sigma else 1)
        wrap = (lambda block: block) if self.remat == "none" else functools.partial(nn.remat, policy=REMAT[self.remat])
        res_block = functools.partial(
            wrap(ResBlock),
            **{"groups": self.groups, "eps": self.norm_eps, "scale_shift": self.scale_shift, "out_init": zeros},
            **{"dropout": self.dropout, "train": train, "dtype": self.dtype},
        )
        attend = functools.partial(
            wrap(AttentionBlock), self.groups, self.norm_eps, self.head_dim, zeros, self.attention, self.dtype
        )
        emb = self._embed(t, cond)

        def unit(h, name, level, number):
            width = self.channels * self.multipliers[level]
            h = res_block(width, name=f"{name}_{level}_res_{number}")(h, emb)
            return attend(name=f"{name}_{level}_attn_{number}")(h) if level in self.attention_levels else h

        def resize(h, name, level):
            if self.resample == "resblock":
                return res_block(h.shape[-1], resample=name, name=f"{name}_{level}_sample")(h, emb)
            layer = {"down": functools.partial(Downsample, self.down_padding), "up": Upsample}[name]
            return layer(dtype=self.dtype, name=f"{name}_{level}_sample")(h)

        h = constrain_image(Conv(self.channels, dtype=self.dtype, name="conv_in")(x))
        skips, last = [h], len(self.multipliers) - 1
        for level in range(last + 1):
            for i in range(self.layers):
                h = unit(h, "down", level, i)
                skips.append(h)
            if level < last:
                h = resize(h, "down", level)
                skips.append(h)

        h = res_block(h.shape[-1], name="mid_res_0")(h, emb)
        h = attend(name="mid_attn_0")(h)
        h = res_block(h.shape[-1], name="mid_res_1")(h, emb)

        for level in reversed(range(last + 1)):
            for i in range(self.layers + 1):
                h = constrain_image(jnp.concatenate([h, skips.pop()], axis=-1))
                h = unit(h, "up", level, i)
            if level > 0:
                h = resize(h, "up", level)

        h = nn.silu(GroupNorm(self.groups, self.norm_eps, name="norm_out")(h))
        y = Conv(out_channels, axes=("conv_in", "small"), kernel_init=zeros, name="conv_out")(h)
        y = constrain_image(y)
        return y[..., : out_channels // 2] if self.learn_sigma and not self.return_sigma else y

    def _embed(self, t: jax.Array, cond: dict) -> jax.Array:
        """Embedding (B, 4 channels) float32 of time and label."""
        size = 4 * self.channels
        order, shift, scale = self.frequency_order, self.frequency_shift, self.time_scale
        emb = TimeEmbed(size, self.channels, order, shift, scale, name="t_embed")(t)
        if self.num_classes:
            label = need(cond, "label", f"a UNet with num_classes = {self.num_classes}")
            emb = emb + Embed(self.num_classes + self.null_class, size, name="y_embed")(label)
        return constrain(emb, "batch", "act")

    def _check(self, x: jax.Array):
        lookup(dict.fromkeys(RESAMPLINGS), self.resample, "model.resample")
        lookup(DOWN_PADDING, self.down_padding, "model.down_padding")
        lookup(REMAT, self.remat, "model.remat")
        check_sizes("model", self.channels, self.multipliers, self.groups, x)
        levels = range(len(self.multipliers))
        # False and True would pass for levels 0 and 1.
        if not set(self.attention_levels) <= set(levels) or any(isinstance(level, bool) for level in self.attention_levels):
            raise ConfigError(f"model.attention_levels = {self.attention_levels}: the levels are {', '.join(map(str, levels))}")
        if self.layers < 1:
            raise ConfigError(f"model.layers = {self.layers}; it must be at least 1")
        if self.return_sigma and not self.learn_sigma:
            raise ConfigError("model.return_sigma needs model.learn_sigma")
