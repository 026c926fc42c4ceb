"""Configs of diffusers <-> infos of our exports; see `flowjax.interop.fields`."""

import math

from flowjax import times
from flowjax.config import ConfigError
from flowjax.interop.fields import (
    CLASSES, DDPM, FLOW, Fields, channels_of, condition, image, means, needs, of_classes, out_channels, plain_dit, plain_input, square,
)  # fmt: skip

# What every config of the library has and which says nothing about a network.
COMMON = ("_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values")


def read_dit(c: Fields) -> dict:
    """diffusers' DiTTransformer2DModel, or the Transformer2DModel with norm_type "ada_norm_zero" that it was before."""
    heads, head_dim, channels = c.take("num_attention_heads", 16), c.take("attention_head_dim", 72), c.take("in_channels", 4)
    c.only("norm_type", "ada_norm_zero")
    c.only("activation_fn", "gelu-approximate")
    c.only("attention_bias", True)
    c.only("norm_elementwise_affine", False)
    c.only("upcast_attention", False)
    # It reaches one norm of two. The weights were trained with 1e-6, which ours has; with 1e-5 outputs differ by about 1e-5.
    c.only("norm_eps", 1e-5, 1e-6)
    for name in ("cross_attention_dim", "num_vector_embeds", "caption_channels", "interpolation_scale", "use_additional_conditions"):
        c.only(name, None)
    for name in ("double_self_attention", "only_cross_attention", "use_linear_projection"):
        c.only(name, False)
    c.only("attention_type", "default")
    c.ignore("dropout", "norm_num_groups")
    model = {
        "name": "dit", "depth": c.take("num_layers", 28), "width": heads * head_dim, "heads": heads, "patch": c.take("patch_size", 2),
        "num_classes": c.take("num_embeds_ada_norm", 1000), "frequency_shift": 1.0, "time_scale": 1000.0,
        **channels_of(c.take("out_channels", None) or channels, channels),
    }  # fmt: skip
    return of_classes(model, image(c.take("sample_size", 32), channels)) | DDPM | {"sample": {"sampler": "ddim", **CLASSES}}


def write_dit(net, info) -> dict:
    """Config of a DiTTransformer2DModel."""
    library = "diffusers' DiTTransformer2DModel"
    plain_dit(net, library)
    needs(net, library, frequency_shift=1.0, time_scale=1000.0, mlp_ratio=4.0)
    plain_input(info, library)
    return {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": net.heads, "attention_head_dim": net.width // net.heads,
        "in_channels": info["shape"][-1], "out_channels": out_channels(net, info), "num_layers": net.depth,
        "sample_size": square(info, library), "patch_size": net.patch, "num_embeds_ada_norm": net.num_classes, "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
    }  # fmt: skip


def read_sd3(c: Fields) -> dict:
    """diffusers' SD3Transformer2DModel. The table of positions is kept as the file has it (positions = "table")."""
    heads, patch, size = c.take("num_attention_heads", 18), c.take("patch_size", 2), c.take("sample_size", 128)
    width, depth = heads * c.take("attention_head_dim", 64), c.take("num_layers", 18)
    channels, dual = c.take("in_channels", 16), c.take("dual_attention_layers", ())
    c.only("caption_projection_dim", width, default=1152)
    if dual != tuple(range(len(dual))):
        raise ConfigError(f"{c.where}: dual_attention_layers = {dual} is not supported; supported: the first layers, (0, 1, ..., n)")
    out = c.take("out_channels", 16)
    model = {
        "name": "mmdit", "depth": depth, "width": width, "heads": heads, "patch": patch, "dual": len(dual),
        "qk_norm": c.choose("qk_norm", {None: False, "rms_norm": True}, None), "positions": "table",
        "table": c.take("pos_embed_max_size", 96), "base": size // patch, "out_channels": 0 if out == channels else out,
    }  # fmt: skip
    conditions = {"text": [333, c.take("joint_attention_dim", 4096)], "pooled": [c.take("pooled_projection_dim", 2048)]}
    sample = {"steps": 28, "sampler": "euler", "grid": {"name": "uniform", "shift": 3.0}, "guidance": {"name": "cfg", "scale": 7.0}}
    # Without a prompt it is given the empty one, not the zeros that stand for a caption that is dropped in training.
    return {"model": model, "shape": image(size, channels), "conditions": conditions, "sample": sample, "null": "empty prompt"} | FLOW


def write_sd3(net, info) -> dict:
    """Config of an SD3Transformer2DModel."""
    library = "diffusers' SD3Transformer2DModel"
    needs(net, library, text_encoder=None, mlp_ratio=4.0, time_scale=1000.0, guidance_embed=False, step_embed=False)
    means(info, library, **FLOW)
    return {
        "_class_name": "SD3Transformer2DModel", "sample_size": net.base * net.patch, "patch_size": net.patch,
        "in_channels": info["shape"][-1], "num_layers": net.depth, "attention_head_dim": net.width // net.heads,
        "num_attention_heads": net.heads, "joint_attention_dim": condition(info, "text"), "caption_projection_dim": net.width,
        "pooled_projection_dim": condition(info, "pooled"), "out_channels": out_channels(net, info),
        "pos_embed_max_size": net.table, "dual_attention_layers": list(range(net.dual)), "qk_norm": "rms_norm" if net.qk_norm else None,
    }  # fmt: skip


def read_flux(c: Fields) -> dict:
    """diffusers' FluxTransformer2DModel, for latents of 128 x 128 (1024 pixels)."""
    c.only("patch_size", 1)
    heads, packed = c.take("num_attention_heads", 24), c.take("in_channels", 64)
    out = c.take("out_channels", None) or packed
    if packed % 4 or out % 4:
        raise ConfigError(f"{c.where}: in_channels = {packed} and out_channels = {out} should be four times those of the latents")
    model = {
        "name": "flux", "depth": c.take("num_layers", 19), "single_depth": c.take("num_single_layers", 38), "heads": heads,
        "width": heads * c.take("attention_head_dim", 128), "rope_axes": c.take("axes_dims_rope", (16, 56, 56)),
        "guidance_embed": c.take("guidance_embeds", False), "out_channels": 0 if out == packed else out // 4,
    }  # fmt: skip
    conditions = {"text": [512, c.take("joint_attention_dim", 4096)], "pooled": [c.take("pooled_projection_dim", 768)]}
    sample = {"steps": 4, "sampler": "euler"}
    if model["guidance_embed"]:
        conditions["guidance"] = []
        sample = {"steps": 28, "sampler": "euler", "grid": {"name": "uniform", "shift": math.exp(times.flux_mu(4096))}}
        sample["guidance"] = {"name": "embedded", "scale": 3.5}
    return {"model": model, "shape": [128, 128, packed // 4], "conditions": conditions, "sample": sample} | FLOW


def write_flux(net, info) -> dict:
    """Config of a FluxTransformer2DModel."""
    library = "diffusers' FluxTransformer2DModel"
    needs(net, library, mlp_ratio=4.0, time_scale=1000.0, patch=2)
    means(info, library, **FLOW)
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 4 * info["shape"][-1],
        "out_channels": 4 * net.out_channels or None, "num_layers": net.depth, "num_single_layers": net.single_depth,
        "attention_head_dim": net.width // net.heads, "num_attention_heads": net.heads, "joint_attention_dim": condition(info, "text"),
        "pooled_projection_dim": condition(info, "pooled"), "guidance_embeds": net.guidance_embed, "axes_dims_rope": list(net.rope_axes),
    }  # fmt: skip


PADDING = {0: "end", 1: "symmetric"}
ORDER = {False: "sin_cos", True: "cos_sin"}


def _blocks(levels: int, attention, resblock: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(down_block_types, up_block_types) of diffusers."""

    def kind(level, side):
        resampling = f"Resnet{'Down' if side == 'Down' else 'Up'}sampleBlock2D" if resblock else f"{side}Block2D"
        return f"Attn{side}Block2D" if level in attention else resampling

    return tuple(kind(i, "Down") for i in range(levels)), tuple(kind(i, "Up") for i in reversed(range(levels)))


def _levels(c: Fields, default) -> dict:
    """channels and multipliers."""
    widths = c.take("block_out_channels", default)
    if any(width % widths[0] for width in widths):
        raise ConfigError(f"{c.where}: block_out_channels = {widths} is not supported: they should be multiples of the first")
    return {"channels": widths[0], "multipliers": tuple(width // widths[0] for width in widths)}


def read_unet(c: Fields) -> dict:
    """diffusers' UNet2DModel, taken for one of noise on DDPM's schedule."""
    levels = _levels(c, (224, 448, 672, 896))
    count, base, groups = len(levels["multipliers"]), levels["channels"], c.take("norm_num_groups", 32)
    down = c.take("down_block_types", ("DownBlock2D", *("AttnDownBlock2D",) * 3))
    up = c.take("up_block_types", (*("AttnUpBlock2D",) * 3, "UpBlock2D"))
    attention = tuple(i for i, name in enumerate(down) if name == "AttnDownBlock2D")
    resample = c.take("downsample_type", "conv"), c.take("upsample_type", "conv")
    resblock = "resnet" in resample or "ResnetDownsampleBlock2D" in down
    wanted = _blocks(count, attention, resblock)
    if (down, up) != wanted or (attention and resample != (("resnet",) * 2 if resblock else ("conv",) * 2)):
        raise ConfigError(
            f"{c.where}: down_block_types = {down}, up_block_types = {up} with downsample_type, upsample_type = {resample} is not "
            f"supported; for this attention it would be {wanted[0]}, {wanted[1]} with one way of resampling"
        )
    scale_shift = c.choose("resnet_time_scale_shift", {"default": False, "scale_shift": True}, "default")
    c.only("attn_norm_num_groups", *((groups,) if scale_shift else (None, groups)), default=None)
    c.only("time_embedding_type", "positional")
    c.only("time_embedding_dim", None, 4 * base)
    c.only("center_input_sample", False)
    c.only("mid_block_type", "UNetMidBlock2D")
    c.only("mid_block_scale_factor", 1)
    c.only("act_fn", "silu")
    c.only("add_attention", True)
    c.only("class_embed_type", None)
    c.ignore("num_train_timesteps")
    channels, classes = c.take("in_channels", 3), c.take("num_class_embeds", None) or 0
    model = {
        "name": "unet", **levels, "layers": c.take("layers_per_block", 2), "attention_levels": attention,
        "head_dim": c.take("attention_head_dim", 8) or 0, "num_classes": classes, "null_class": False, "scale_shift": scale_shift,
        "resample": "resblock" if resblock else "conv", "down_padding": c.choose("downsample_padding", PADDING, 1),
        "frequency_order": c.choose("flip_sin_to_cos", ORDER, True), "frequency_shift": float(c.take("freq_shift", 0)),
        "time_scale": 1000.0, "groups": groups, "norm_eps": c.take("norm_eps", 1e-5), "dropout": c.take("dropout", 0.0),
        **channels_of(c.take("out_channels", 3), channels),
    }  # fmt: skip
    return of_classes(model, image(c.take("sample_size", None), channels)) | DDPM | {"sample": {"steps": 50, "sampler": "ddim"}}


def write_unet(net, info) -> dict:
    """Config of a UNet2DModel."""
    library = "diffusers' UNet2DModel"
    needs(net, library, time_scale=1000.0)
    plain_input(info, library)
    height, width, channels = info["shape"]
    resblock = net.resample == "resblock"
    down, up = _blocks(len(net.multipliers), net.attention_levels, resblock)
    return {
        "_class_name": "UNet2DModel", "sample_size": height if height == width else [height, width], "in_channels": channels,
        "out_channels": out_channels(net, info), "block_out_channels": [net.channels * m for m in net.multipliers],
        "layers_per_block": net.layers, "down_block_types": list(down), "up_block_types": list(up),
        "attention_head_dim": net.head_dim or None, "downsample_type": "resnet" if resblock else "conv",
        "upsample_type": "resnet" if resblock else "conv", "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
        "attn_norm_num_groups": net.groups if net.scale_shift else None, "norm_num_groups": net.groups, "norm_eps": net.norm_eps,
        "downsample_padding": _key(PADDING, net.down_padding), "flip_sin_to_cos": _key(ORDER, net.frequency_order),
        "freq_shift": int(net.frequency_shift) if net.frequency_shift.is_integer() else net.frequency_shift, "dropout": net.dropout,
        "num_class_embeds": net.num_classes + net.null_class if net.num_classes else None, "class_embed_type": None,
        "time_embedding_type": "positional", "act_fn": "silu",
    }  # fmt: skip


def _key(table, value):
    return next(k for k, v in table.items() if v == value)


def read_autoencoder(c: Fields) -> dict:
    """diffusers' AutoencoderKL. Its scaling of latents, (z - shift) scale or (z - mean) scale / std, becomes our statistics."""
    levels, latent_channels = _levels(c, (64,)), c.take("latent_channels", 4)
    count = len(levels["multipliers"])
    c.only("down_block_types", ("DownEncoderBlock2D",) * count, default=("DownEncoderBlock2D",))
    c.only("up_block_types", ("UpDecoderBlock2D",) * count, default=("UpDecoderBlock2D",))
    c.only("act_fn", "silu")
    quant = c.take("use_quant_conv", True)
    c.only("use_post_quant_conv", quant, default=True)
    c.ignore("force_upcast")
    scale, shift = c.take("scaling_factor", 0.18215), c.take("shift_factor", None) or 0.0
    mean, std = c.take("latents_mean", None), c.take("latents_std", None)
    if (mean is None) != (std is None) or (mean is not None and shift):
        raise ConfigError(f"{c.where}: latents_mean and latents_std belong together, and without shift_factor")
    mean, std = (shift,) * latent_channels if mean is None else mean, (1.0,) * latent_channels if std is None else std
    if not len(mean) == len(std) == latent_channels:
        raise ConfigError(f"{c.where}: latents_mean and latents_std should have {latent_channels} numbers each")
    model = {
        "name": "autoencoder_kl", **levels, "layers": c.take("layers_per_block", 1), "latent_channels": latent_channels,
        "image_channels": c.take("out_channels", 3), "quant_conv": quant, "mid_attention": c.take("mid_block_add_attention", True),
        "groups": c.take("norm_num_groups", 32),
    }  # fmt: skip
    latents = {"mean": [float(m) for m in mean], "std": [s / scale for s in std]}
    return {"model": model, "shape": image(c.take("sample_size", 32), c.take("in_channels", 3)), "conditions": {}, "latents": latents}


def write_autoencoder(net, info) -> dict:
    """Config of an AutoencoderKL; statistics that differ between channels become latents_mean and latents_std."""
    count, sample = len(net.multipliers), info["shape"]
    latents = info.get("latents") or {"mean": [0.0] * net.latent_channels, "std": [1.0] * net.latent_channels}
    if len({*latents["mean"]}) == len({*latents["std"]}) == 1:
        scaling = {"scaling_factor": inverse(latents["std"][0]), "shift_factor": latents["mean"][0] or None}
    else:
        scaling = {"scaling_factor": 1.0, "latents_mean": list(latents["mean"]), "latents_std": list(latents["std"])}
    return {
        "_class_name": "AutoencoderKL", "in_channels": sample[-1], "out_channels": net.image_channels, "sample_size": sample[0],
        "down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count,
        "block_out_channels": [net.channels * m for m in net.multipliers], "layers_per_block": net.layers, "act_fn": "silu",
        "latent_channels": net.latent_channels, "norm_num_groups": net.groups, "use_quant_conv": net.quant_conv,
        "use_post_quant_conv": net.quant_conv, "mid_block_add_attention": net.mid_attention, **scaling,
    }  # fmt: skip


def inverse(value: float) -> float:
    """The number with the fewest digits whose inverse is `value`, so that 0.18215 comes back as it was."""
    digits = (float(f"{1 / value:.{n}g}") for n in range(1, 18))
    return next((d for d in digits if 1 / d == value), 1 / value)
