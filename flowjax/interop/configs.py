"""The config.json of library classes <-> what an export says of its network (flowjax.train.export).

For each kind there are two functions. `read_<kind>(fields)` returns {"model", "shape", "conditions", ...}: our model section, the
shapes of its inputs and, for denoisers, what its output means and how it is sampled unless something else is asked for.
`write_<kind>(net, info)` returns their config. A field that we do not know is refused by name, and so is a value that our network
cannot express; a field that is absent has the library's default. What matters to training or to other classes only is passed over.
"""

import math
from collections.abc import Mapping
from typing import Any

from flowjax import times
from flowjax.config import ConfigError, keywords
from flowjax.models.clip import CLIPText
from flowjax.models.vit import IMAGENET

REQUIRED = object()
# What files say of every class of the two libraries, and which says nothing about a network.
DIFFUSERS = ("_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values")
TRANSFORMERS = (
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention", "architectures", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past", "output_scores", "pad_token_id", "prefix",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p",
    "use_bfloat16", "use_cache",
)  # fmt: skip
DDPM = {"path": {"name": "vp_linear"}, "prediction": "eps", "input_scaling": {"name": "ddpm"}}
FLOW = {"path": {"name": "rectified"}, "prediction": "velocity", "input_scaling": "none"}


class Fields:
    """A config read field by field; `done` refuses what nobody asked for, except `common` fields."""

    def __init__(self, config: Mapping[str, Any], where: str, common: tuple[str, ...] = ()):
        self.left, self.where, self.common = dict(config), where, common

    def take(self, name: str, default=REQUIRED):
        """The field, or the library's default; a list as a tuple."""
        if name not in self.left and default is REQUIRED:
            raise ConfigError(f"{self.where}: {name} is missing")
        value = self.left.pop(name, default)
        return tuple(value) if isinstance(value, list) else value

    def choose(self, name: str, table: Mapping, default=REQUIRED):
        """table[field]; ConfigError where that is none of the table."""
        value = self.take(name, default)
        for key, meaning in table.items():
            if value == key:
                return meaning
        raise ConfigError(f"{self.where}: {name} = {value!r} is not supported; supported: {', '.join(map(repr, table))}")

    def only(self, name: str, *valid, default=REQUIRED):
        """The field must be one of `valid`, the first of which is the library's default unless another one is given."""
        self.choose(name, dict.fromkeys(valid), valid[0] if default is REQUIRED else default)

    def ignore(self, *names: str):
        """Pass over fields that do not touch the network."""
        for name in names:
            self.left.pop(name, None)

    def section(self, name: str) -> "Fields":
        """The nested config `name`."""
        value = self.take(name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {name} should be an object")
        return Fields(value, f"{self.where}: {name}", self.common)

    def done(self):
        """ConfigError that lists the fields which are left."""
        if left := {k: v for k, v in self.left.items() if k not in self.common}:
            raise ConfigError(f"{self.where}: unknown {', '.join(f'{k} = {v!r}' for k, v in sorted(left.items()))}")


def needs(net, library: str, **wanted):
    """ConfigError unless fields of `net` have the values that alone can be expressed in `library`."""
    for name, value in wanted.items():
        if getattr(net, name) != value:
            raise ConfigError(f"model.{name} = {getattr(net, name)!r} cannot be expressed in {library}, which has {value!r}")


def means(info, library: str, **wanted):
    """ConfigError unless the network's output means what the users of `library` take it for."""
    for name, value in wanted.items():
        if info[name] != value:
            raise ConfigError(f"{name} = {info[name]!r}: the users of {library} expect a network of {name} = {value!r}")


def condition(info, name: str) -> int:
    """Size of the vectors of a condition."""
    return info["conditions"][name][-1]


def _image(size, channels: int) -> list[int]:
    """Shape of an image whose size is one number, (height, width), or not known."""
    height, width = size if isinstance(size, tuple) else (size, size)
    return [height, width, channels]


def _channels(out: int, channels: int) -> dict:
    """Our fields for `out` channels of a head: twice as many as come in are those of a learned variance."""
    if out == 2 * channels:
        return {"learn_sigma": True}
    return {"out_channels": 0 if out == channels else out}


def _out_channels(net, info) -> int:
    return (net.out_channels or info["shape"][-1]) * (2 if getattr(net, "learn_sigma", False) else 1)


def _square(info, library: str) -> int:
    height, width = info["shape"][:2]
    if height != width:
        raise ConfigError(f"the network was made for {height} x {width}; {library} has one size for both")
    return height


# --- DiT and SiT


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
        **_channels(c.take("out_channels", None) or channels, channels),
    }  # fmt: skip
    return _of_classes(model, _image(c.take("sample_size", 32), channels)) | DDPM | {"sample": {"sampler": "ddim", **CLASSES}}


CLASSES = {"steps": 50, "guidance": {"name": "cfg", "scale": 4.0}}


def _of_classes(model, shape):
    count = model.get("num_classes", 0)
    return {"model": model, "shape": shape, "num_classes": count, "conditions": {"label": []} if count else {}}


def _plain_input(info, library: str):
    """ConfigError where something stands between x_t and the network that users of `library` would have to know."""
    if keywords(info["input_scaling"])["name"] not in ("none", "ddpm"):
        raise ConfigError(f"input_scaling = {info['input_scaling']!r} cannot be expressed in {library}; it takes x_t as it is")


def _plain_dit(net, library: str):
    needs(net, library, conditioning="adaln_zero", norm="layer", qk_norm=False, mlp="gelu", rope=False, sincos=True)
    if not net.num_classes:
        raise ConfigError(f"model.num_classes = 0 cannot be expressed in {library}, which is a network of classes")


def write_dit(net, info) -> dict:
    """Config of a DiTTransformer2DModel."""
    library = "diffusers' DiTTransformer2DModel"
    _plain_dit(net, library)
    needs(net, library, frequency_shift=1.0, time_scale=1000.0, mlp_ratio=4.0)
    _plain_input(info, library)
    return {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": net.heads, "attention_head_dim": net.width // net.heads,
        "in_channels": info["shape"][-1], "out_channels": _out_channels(net, info), "num_layers": net.depth,
        "sample_size": _square(info, library), "patch_size": net.patch, "num_embeds_ada_norm": net.num_classes, "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
    }  # fmt: skip


def read_original_dit(c: Fields) -> dict:
    """The arguments of the class DiT of the paper's code."""
    return _read_original(c, 1000.0) | DDPM | {"sample": {"sampler": "ddim", **CLASSES}}


def read_sit(c: Fields) -> dict:
    """The arguments of the class SiT of the paper's code."""
    meaning = FLOW | {"input_scaling": {"name": "reversed"}}
    return _read_original(c, 1.0) | meaning | {"sample": {"sampler": "heun", **CLASSES}}


def _read_original(c, time_scale):
    if not c.take("class_dropout_prob", 0.1):
        raise ConfigError(f"{c.where}: class_dropout_prob = 0 is not supported: the label table then has no row for 'no class'")
    model = {
        "name": "dit", "depth": c.take("depth", 28), "width": c.take("hidden_size", 1152), "heads": c.take("num_heads", 16),
        "patch": c.take("patch_size", 2), "num_classes": c.take("num_classes", 1000), "mlp_ratio": c.take("mlp_ratio", 4.0),
        "learn_sigma": c.take("learn_sigma", True), "time_scale": time_scale,
    }  # fmt: skip
    return _of_classes(model, _image(c.take("input_size", 32), c.take("in_channels", 4)))


def write_original_dit(net, info) -> dict:
    """The arguments of the paper's DiT."""
    _plain_input(info, "the paper's DiT")
    return _write_original(net, info, "the paper's DiT", 1000.0)


def write_sit(net, info) -> dict:
    """The arguments of the paper's SiT; only of a network that gets its time as a SiT does, which an imported one is."""
    means(info, "the paper's SiT", **FLOW | {"input_scaling": {"name": "reversed"}})
    return _write_original(net, info, "the paper's SiT", 1.0)


def _write_original(net, info, library, time_scale):
    _plain_dit(net, library)
    needs(net, library, frequency_shift=0.0, time_scale=time_scale, out_channels=0)
    return {
        "input_size": _square(info, library), "patch_size": net.patch, "in_channels": info["shape"][-1], "hidden_size": net.width,
        "depth": net.depth, "num_heads": net.heads, "mlp_ratio": net.mlp_ratio, "class_dropout_prob": 0.1,
        "num_classes": net.num_classes, "learn_sigma": net.learn_sigma,
    }  # fmt: skip


# --- text to image


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
    return {"model": model, "shape": _image(size, channels), "conditions": conditions, "sample": sample} | FLOW


def write_sd3(net, info) -> dict:
    """Config of an SD3Transformer2DModel."""
    library = "diffusers' SD3Transformer2DModel"
    needs(net, library, text_encoder=None, mlp_ratio=4.0, time_scale=1000.0)
    means(info, library, **FLOW)
    return {
        "_class_name": "SD3Transformer2DModel", "sample_size": net.base * net.patch, "patch_size": net.patch,
        "in_channels": info["shape"][-1], "num_layers": net.depth, "attention_head_dim": net.width // net.heads,
        "num_attention_heads": net.heads, "joint_attention_dim": condition(info, "text"), "caption_projection_dim": net.width,
        "pooled_projection_dim": condition(info, "pooled"), "out_channels": _out_channels(net, info),
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


# --- convolutional networks


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
        **_channels(c.take("out_channels", 3), channels),
    }  # fmt: skip
    return _of_classes(model, _image(c.take("sample_size", None), channels)) | DDPM | {"sample": {"steps": 50, "sampler": "ddim"}}


def write_unet(net, info) -> dict:
    """Config of a UNet2DModel."""
    library = "diffusers' UNet2DModel"
    needs(net, library, time_scale=1000.0)
    _plain_input(info, library)
    height, width, channels = info["shape"]
    resblock = net.resample == "resblock"
    down, up = _blocks(len(net.multipliers), net.attention_levels, resblock)
    return {
        "_class_name": "UNet2DModel", "sample_size": height if height == width else [height, width], "in_channels": channels,
        "out_channels": _out_channels(net, info), "block_out_channels": [net.channels * m for m in net.multipliers],
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
    return {"model": model, "shape": _image(c.take("sample_size", 32), c.take("in_channels", 3)), "conditions": {}, "latents": latents}


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


# --- encoders


GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
HIDDEN_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}

def _tower(c: Fields, width: int, hidden: int, heads: int) -> dict:
    """What the configs of both towers of CLIP have in common."""
    width = c.take("hidden_size", width)
    c.only("intermediate_size", 4 * width, default=hidden)
    c.only("layer_norm_eps", 1e-5)
    c.ignore("attention_dropout")
    names = {"depth": ("num_hidden_layers", 12), "heads": ("num_attention_heads", heads)}
    return {"width": width, **{k: c.take(*v) for k, v in names.items()}, "mlp": c.choose("hidden_act", GELUS, "quick_gelu")}


def _text_tower(c: Fields) -> dict:
    model = _tower(c, 512, 2048, 8)
    return model | {"vocab": c.take("vocab_size", 49408), "length": c.take("max_position_embeddings", 77), "eos": c.take("eos_token_id", 49407)}


def _image_tower(c: Fields) -> dict:
    model, patch, side = _tower(c, 768, 3072, 12), c.take("patch_size", 32), c.take("image_size", 224)
    c.only("num_channels", 3)
    return model | {"patch": patch, "grid": side // patch}


def _alone_or_of_both(c: Fields, which: str, name: str, read) -> dict:
    """A tower by itself, with or without its projection, or out of a config of both."""
    of_both = c.choose("architectures", {(name,): False, (f"{name}WithProjection",): None, ("CLIPModel",): True})
    if of_both:
        return _of_both(c, which, read) | {"features": _both(c)}
    features = c.take("projection_dim", 512)
    return read(c) | {"features": features if of_both is None else 0}


def _of_both(c: Fields, which: str, read) -> dict:
    section = c.section(f"{which}_config")
    section.ignore("projection_dim")
    model = read(section)
    section.done()
    return model


def _both(c: Fields) -> int:
    """The rest of a config of both towers: the size of their projections. transformers 4 wrote the sections twice."""
    c.ignore("logit_scale_init_value", "text_config", "vision_config", "text_config_dict", "vision_config_dict")
    return c.take("projection_dim", 512)


def read_clip_text(c: Fields) -> dict:
    """transformers' CLIPTextModel, CLIPTextModelWithProjection, or the text's tower of a CLIPModel."""
    model = {"name": "clip_text", **_alone_or_of_both(c, "text", "CLIPTextModel", _text_tower)}
    return {"model": model, "shape": [], "conditions": {"tokens": [model["length"]]}}


def read_clip_vision(c: Fields) -> dict:
    """transformers' CLIPVisionModel, CLIPVisionModelWithProjection, or the image's tower of a CLIPModel."""
    model = {"name": "clip_vision", **_alone_or_of_both(c, "vision", "CLIPVisionModel", _image_tower)}
    return {"model": model, "shape": _image(model["grid"] * model["patch"], 3), "conditions": {}}


def read_clip(c: Fields) -> dict:
    """transformers' CLIPModel."""
    c.only("architectures", ("CLIPModel",))
    text, image = _of_both(c, "text", _text_tower), _of_both(c, "vision", _image_tower)
    model = {"name": "clip", "text": text, "image": image, "features": _both(c)}
    return {"model": model, "shape": _image(image["grid"] * image["patch"], 3), "conditions": {"tokens": [text["length"]]}}


def write_clip_text(net, info) -> dict:
    """Config of a CLIPTextModel, with a projection where there is one."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if net.features else "CLIPTextModel"], "model_type": "clip_text_model",
        **_write_tower(net), "vocab_size": net.vocab, "max_position_embeddings": net.length, "eos_token_id": net.eos,
    }  # fmt: skip


def write_clip_vision(net, info) -> dict:
    """Config of a CLIPVisionModel, with a projection where there is one."""
    return {
        "architectures": ["CLIPVisionModelWithProjection" if net.features else "CLIPVisionModel"], "model_type": "clip_vision_model",
        **_write_tower(net), "patch_size": net.patch, "image_size": net.patch * net.grid, "num_channels": 3,
    }  # fmt: skip


def _write_tower(net):
    if isinstance(net, CLIPText):  # which state a caller reads is not in their config
        needs(net, "a config of transformers, whose hidden_states are asked for at the call", penultimate=False)
    return {
        "hidden_size": net.width, "intermediate_size": 4 * net.width, "num_hidden_layers": net.depth, "num_attention_heads": net.heads,
        "hidden_act": HIDDEN_ACT[net.mlp], "layer_norm_eps": 1e-5, **({"projection_dim": net.features} if net.features else {}),
    }  # fmt: skip


def write_clip(net, info) -> dict:
    """Config of a CLIPModel."""
    sections = {f"{theirs}_config": write(net.tower(ours), info) for theirs, ours, write in
                (("text", "text", write_clip_text), ("vision", "image", write_clip_vision))}  # fmt: skip
    for section in sections.values():
        del section["architectures"]
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": net.features, **sections}


def read_t5(c: Fields) -> dict:
    """The encoder of transformers' T5 v1.1 and UMT5 (model_type "t5" and "umt5"), whichever class wrote it."""
    shared = c.choose("model_type", {"t5": True, "umt5": False})
    c.only("feed_forward_proj", "gated-gelu", default="relu" if shared else "gated-gelu")
    c.only("dense_act_fn", "gelu_new")
    c.only("is_gated_act", True)
    c.only("layer_norm_epsilon", 1e-6)
    c.ignore("num_decoder_layers", "dropout_rate", "eos_token_id", "n_positions", "scalable_attention", "scale_decoder_outputs")
    names = {
        "width": ("d_model", 512), "depth": ("num_layers", 6 if shared else 8), "heads": ("num_heads", 8 if shared else 6),
        "hidden": ("d_ff", 2048 if shared else 1024), "head_dim": ("d_kv", 64), "vocab": ("vocab_size", 32128 if shared else 250112),
        "buckets": ("relative_attention_num_buckets", 32), "distance": ("relative_attention_max_distance", 128),
    }  # fmt: skip
    model = {"name": "t5", **{ours: c.take(*theirs) for ours, theirs in names.items()}, "shared_bias": shared}
    return {"model": model, "shape": [], "conditions": {"tokens": [512]}}


def write_t5(net, info) -> dict:
    """Config of a T5EncoderModel or UMT5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel" if net.shared_bias else "UMT5EncoderModel"],
        "model_type": "t5" if net.shared_bias else "umt5", "d_model": net.width, "d_kv": net.head_dim, "d_ff": net.hidden,
        "num_layers": net.depth, "num_heads": net.heads, "vocab_size": net.vocab, "relative_attention_num_buckets": net.buckets,
        "relative_attention_max_distance": net.distance, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
    }  # fmt: skip


BACKBONE = ("apply_layernorm", "drop_path_rate", "out_features", "out_indices", "reshape_hidden_states", "stage_names")
MAE = ("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_attention_heads", "decoder_num_hidden_layers", "mask_ratio",
       "norm_pix_loss")  # fmt: skip


def read_vit(c: Fields) -> dict:
    """transformers' ViT, ViTMAE, Dinov2 and Dinov2WithRegisters (told apart by model_type): the encoder of whichever class wrote it."""
    kind = c.choose("model_type", {k: k for k in ("vit", "vit_mae", "dinov2", "dinov2_with_registers")})
    dino = kind.startswith("dinov2")
    width, patch, side = c.take("hidden_size", 768), c.take("patch_size", 14 if kind == "dinov2" else 16), c.take("image_size", 224)
    c.only("num_channels", 3)
    c.only("qkv_bias", True)
    c.ignore("attention_probs_dropout_prob", "hidden_dropout_prob", "encoder_stride", "pooler_act", "pooler_output_size", *BACKBONE, *MAE)
    model = {
        "name": "vit", "patch": patch, "width": width, "depth": c.take("num_hidden_layers", 12),
        "heads": c.take("num_attention_heads", 12), "grid": side // patch, "mlp": c.choose("hidden_act", GELUS, "gelu"),
        "eps": c.take("layer_norm_eps", 1e-6 if dino else 1e-12), **(IMAGENET if kind != "vit" else {}),
    }  # fmt: skip
    if not dino:
        model["mlp_ratio"] = c.take("intermediate_size", 3072) / width
        return {"model": model | ({"positions": "sincos"} if kind == "vit_mae" else {}), "shape": _image(side, 3), "conditions": {}}
    model["mlp_ratio"] = float(c.take("mlp_ratio", 4))
    model["layerscale"] = float(c.take("layerscale_value", 1.0))
    if not model["layerscale"]:
        raise ConfigError(f"{c.where}: layerscale_value = 0 is not supported: our network would then have no such scale")
    if c.take("use_swiglu_ffn", False):
        model["mlp"] = "swiglu"
    model["mask_token"] = c.take("use_mask_token", True)
    if kind == "dinov2_with_registers":
        model |= {"registers": c.take("num_register_tokens", 4), "antialias": True}
    return {"model": model, "shape": _image(side, 3), "conditions": {}}


def write_vit(net, info) -> dict:
    """Config of a ViTModel, ViTMAEModel, Dinov2Model or Dinov2WithRegistersModel."""
    side = net.grid * net.patch
    config = {
        "hidden_size": net.width, "num_hidden_layers": net.depth, "num_attention_heads": net.heads, "image_size": side,
        "patch_size": net.patch, "num_channels": 3, "layer_norm_eps": net.eps, "qkv_bias": True,
    }  # fmt: skip
    if not net.layerscale:
        needs(net, "transformers' ViT", registers=0, antialias=False, mask_token=False)
        if net.mlp == "swiglu":
            raise ConfigError("model.mlp = 'swiglu' cannot be expressed in transformers' ViT")
        name, kind = ("ViTMAEModel", "vit_mae") if net.positions == "sincos" else ("ViTModel", "vit")
        config |= {"intermediate_size": net.hidden, "hidden_act": HIDDEN_ACT[net.mlp]}
        masked = {"mask_ratio": 0.0} if kind == "vit_mae" else {}  # theirs would otherwise hide three quarters of the image
        return {"architectures": [name], "model_type": kind, **config, **masked}
    needs(net, "transformers' DINOv2", positions="learned", antialias=bool(net.registers))
    if net.mlp_ratio != int(net.mlp_ratio):
        raise ConfigError(f"model.mlp_ratio = {net.mlp_ratio} cannot be expressed in transformers' DINOv2, which has whole numbers")
    config |= {"mlp_ratio": int(net.mlp_ratio), "layerscale_value": net.layerscale, "use_swiglu_ffn": net.mlp == "swiglu"}
    config |= {"hidden_act": "gelu" if net.mlp == "swiglu" else HIDDEN_ACT[net.mlp]}
    if net.registers:
        needs(net, "transformers' DINOv2 with registers", mask_token=True)
        return {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers", **config, "num_register_tokens": net.registers}
    return {"architectures": ["Dinov2Model"], "model_type": "dinov2", **config, "use_mask_token": net.mask_token}
