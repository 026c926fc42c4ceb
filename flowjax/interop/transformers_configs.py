"""Configs of transformers, versions 4 and 5, <-> infos of our exports; see `flowjax.interop.fields`."""

from flowjax.config import ConfigError
from flowjax.interop.fields import Fields, image, needs
from flowjax.models.clip import CLIPText
from flowjax.models.vit import IMAGENET

# What every config of the library may have and which says nothing about an encoder.
COMMON = (
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
    names = {"vocab": ("vocab_size", 49408), "length": ("max_position_embeddings", 77), "eos": ("eos_token_id", 49407)}
    return _tower(c, 512, 2048, 8) | {k: c.take(*v) for k, v in names.items()}


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
    return {"model": model, "shape": image(model["grid"] * model["patch"], 3), "conditions": {}}


def read_clip(c: Fields) -> dict:
    """transformers' CLIPModel."""
    c.only("architectures", ("CLIPModel",))
    towers = {"text": _of_both(c, "text", _text_tower), "image": _of_both(c, "vision", _image_tower)}
    side = towers["image"]["grid"] * towers["image"]["patch"]
    model = {"name": "clip", **towers, "features": _both(c)}
    return {"model": model, "shape": image(side, 3), "conditions": {"tokens": [towers["text"]["length"]]}}


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
        return {"model": model | ({"positions": "sincos"} if kind == "vit_mae" else {}), "shape": image(side, 3), "conditions": {}}
    model["mlp_ratio"] = float(c.take("mlp_ratio", 4))
    model["layerscale"] = float(c.take("layerscale_value", 1.0))
    if not model["layerscale"]:
        raise ConfigError(f"{c.where}: layerscale_value = 0 is not supported: our network would then have no such scale")
    if c.take("use_swiglu_ffn", False):
        model["mlp"] = "swiglu"
    model["mask_token"] = c.take("use_mask_token", True)
    if kind == "dinov2_with_registers":
        model |= {"registers": c.take("num_register_tokens", 4), "antialias": True}
    return {"model": model, "shape": image(side, 3), "conditions": {}}


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
        config |= {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
        return config | {"num_register_tokens": net.registers}
    return {"architectures": ["Dinov2Model"], "model_type": "dinov2", **config, "use_mask_token": net.mask_token}
