"""Every kind that tools.convert_weights reads and writes, against the class of its library; and the sizes of published networks.

    python -m tools.parity [--only=sd3,t5]

For each case a tiny network of the library gets random parameters (all of them) and goes through files both ways:
save_pretrained -> flowjax, and flowjax -> from_pretrained. Printed are the largest differences of outputs, relative to the largest
output, and whether all tensors came back bit for bit. Needs torch, diffusers and transformers. The papers' DiT and SiT are
diffusers' DiT with the frequencies of the papers, its tensors renamed.
"""

import contextlib
import io
import json
import math
import pathlib
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from flowjax.interop import files, library
from flowjax.train import export

ONLY = flags.DEFINE_list("only", [], "Cases to run; default: all.")


class Case(NamedTuple):
    """A tiny network in its library's words."""

    library: str
    model: str
    config: dict

    @property
    def name(self) -> str:
        """The class."""
        return self.config.get("_class_name") or self.config.get("architectures", [f"{self.model} of the paper"])[0]


DIT = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 2, "sample_size": 8,
       "num_embeds_ada_norm": 5, "norm_eps": 1e-6}  # fmt: skip
PAPER = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SD3 = {"sample_size": 12, "in_channels": 3, "out_channels": 3, "num_layers": 3, "num_attention_heads": 3, "attention_head_dim": 8,
       "joint_attention_dim": 20, "caption_projection_dim": 24, "pooled_projection_dim": 12, "pos_embed_max_size": 8}  # fmt: skip
FLUX = {"in_channels": 12, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 3, "attention_head_dim": 12,
        "joint_attention_dim": 20, "pooled_projection_dim": 10, "axes_dims_rope": [2, 4, 6]}  # fmt: skip
UNET = {"sample_size": [8, 12], "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
VAE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8,
       "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
TEXT = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 31,
        "max_position_embeddings": 7, "projection_dim": 10, "eos_token_id": 30}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 6, "patch_size": 2,
          "projection_dim": 10}  # fmt: skip
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 3, "vocab_size": 31, "feed_forward_proj": "gated-gelu"}
VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 6, "patch_size": 2}


def _diffusers(model, name, config, **more):
    return Case("diffusers", model, {"_class_name": name, **config, **more})


def _transformers(model, name, kind, config, **more):
    return Case("transformers", model, {"architectures": [name], "model_type": kind, **config, **more})


CASES = {
    "dit": _diffusers("dit", "DiTTransformer2DModel", DIT),
    "paper_dit": Case("original", "dit", PAPER),
    "paper_sit": Case("original", "sit", PAPER),
    "sd3": _diffusers("sd3", "SD3Transformer2DModel", SD3),
    "sd35": _diffusers("sd3", "SD3Transformer2DModel", SD3, dual_attention_layers=[0], qk_norm="rms_norm"),
    "flux_dev": _diffusers("flux", "FluxTransformer2DModel", FLUX, guidance_embeds=True),
    "flux_schnell": _diffusers("flux", "FluxTransformer2DModel", FLUX),
    "unet_ddpm": _diffusers(
        "unet", "UNet2DModel", UNET, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6
    ),
    "unet_adm": _diffusers(
        "unet", "UNet2DModel", UNET, out_channels=6, attention_head_dim=4, downsample_type="resnet", upsample_type="resnet",
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"], up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4, num_class_embeds=5,
    ),
    "vae_sd1": _diffusers("autoencoder_kl", "AutoencoderKL", VAE),
    "vae_flux": _diffusers(
        "autoencoder_kl", "AutoencoderKL", VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.3611, shift_factor=0.1159,
    ),
    "clip_text": _transformers("clip_text", "CLIPTextModel", "clip_text_model", TEXT),
    "clip_text_projected": _transformers("clip_text", "CLIPTextModelWithProjection", "clip_text_model", TEXT, hidden_act="gelu"),
    "clip_vision": _transformers("clip_vision", "CLIPVisionModel", "clip_vision_model", VISION),
    "clip_vision_projected": _transformers("clip_vision", "CLIPVisionModelWithProjection", "clip_vision_model", VISION),
    "clip": _transformers("clip", "CLIPModel", "clip", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 10}),
    "t5": _transformers("t5", "T5EncoderModel", "t5", T5),
    "umt5": _transformers("t5", "UMT5EncoderModel", "umt5", T5),
    "vit": _transformers("vit", "ViTModel", "vit", VIT, intermediate_size=96),
    "mae": _transformers("vit", "ViTMAEModel", "vit_mae", VIT, intermediate_size=96, mask_ratio=0.0),
    "dinov2": _transformers("vit", "Dinov2Model", "dinov2", VIT),
    "dinov2_swiglu": _transformers("vit", "Dinov2Model", "dinov2", VIT, use_swiglu_ffn=True),
    "dinov2_registers": _transformers("vit", "Dinov2WithRegistersModel", "dinov2_with_registers", VIT, num_register_tokens=2),
}  # fmt: skip


# --- published networks: (library, model, their config, parameters as counted in the library's class)

XL = {"activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72, "cross_attention_dim": None,
      "in_channels": 4, "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 16,
      "num_embeds_ada_norm": 1000, "num_layers": 28, "out_channels": 8, "patch_size": 2, "sample_size": 32}  # fmt: skip
SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
KL = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 256,
      "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
CIFAR = {"block_out_channels": [128, 256, 256, 256], "sample_size": 32, "attention_head_dim": None, "downsample_padding": 0,
         "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "mid_block_scale_factor": 1,
         "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
         "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
ADM = {"sample_size": 64, "block_out_channels": [192, 384, 576, 768], "layers_per_block": 3, "attention_head_dim": 64, "out_channels": 6,
       "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3], "up_block_types": [*["AttnUpBlock2D"] * 3,
       "ResnetUpsampleBlock2D"], "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
       "attn_norm_num_groups": 32, "num_class_embeds": 1000}  # fmt: skip
LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768, "eos_token_id": 2}
BIG_TEXT = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "hidden_act": "gelu",
            "projection_dim": 1280}  # fmt: skip
LARGE_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}

PUBLISHED = {
    "DiT-XL/2": (_diffusers("dit", "Transformer2DModel", XL), 674_834_720),
    "DiT-XL/2, the paper's": (Case("original", "dit", {}), 674_834_720),
    "SiT-XL/2": (Case("original", "sit", {}), 674_834_720),
    "SD3 medium": (_diffusers("sd3", "SD3Transformer2DModel", SD3_MEDIUM), 2_084_951_104),
    "SD3.5 medium": (
        _diffusers(
            "sd3", "SD3Transformer2DModel", SD3_MEDIUM, pos_embed_max_size=384, dual_attention_layers=[*range(13)], qk_norm="rms_norm"
        ),
        2_469_663_936,
    ),
    "SD3.5 large": (
        _diffusers(
            "sd3", "SD3Transformer2DModel", SD3_MEDIUM, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
        ),
        8_146_280_768,
    ),
    "FLUX.1 dev": (_diffusers("flux", "FluxTransformer2DModel", {"guidance_embeds": True}), 11_901_408_320),
    "FLUX.1 schnell": (_diffusers("flux", "FluxTransformer2DModel", {"guidance_embeds": False}), 11_891_178_560),
    "DDPM CIFAR-10": (_diffusers("unet", "UNet2DModel", CIFAR), 35_746_307),
    "ADM ImageNet-64": (_diffusers("unet", "UNet2DModel", ADM), 295_904_454),
    "VAE of SD 1, 2, XL": (_diffusers("autoencoder_kl", "AutoencoderKL", KL), 83_653_863),
    "VAE of FLUX.1": (
        _diffusers("autoencoder_kl", "AutoencoderKL", KL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        83_819_683,
    ),
    "CLIP ViT-B/32": (_transformers("clip", "CLIPModel", "clip", {"text_config": {}, "vision_config": {}}), 151_277_313),
    "CLIP ViT-L/14": (
        _transformers("clip", "CLIPModel", "clip", {"text_config": LARGE_TEXT, "vision_config": LARGE_VISION, "projection_dim": 768}),
        427_616_513,
    ),
    "CLIP ViT-L/14, text": (_transformers("clip_text", "CLIPTextModel", "clip_text_model", LARGE_TEXT), 123_060_480),
    "OpenCLIP bigG, text": (_transformers("clip_text", "CLIPTextModelWithProjection", "clip_text_model", BIG_TEXT), 694_659_840),
    "T5 v1.1 XXL encoder": (_transformers("t5", "T5EncoderModel", "t5", XXL), 4_762_310_656),
    "UMT5 XXL encoder": (_transformers("t5", "UMT5EncoderModel", "umt5", XXL, vocab_size=256384), 5_680_910_336),
    "ViT-B/16": (_transformers("vit", "ViTModel", "vit", {}), 85_798_656),  # 86,567,656 with a classifier of 1000
    "DINOv2 B": (_transformers("vit", "Dinov2Model", "dinov2", {"image_size": 518}), 86_580_480),
    "DINOv2 g": (
        _transformers(
            "vit", "Dinov2Model", "dinov2",
            {"image_size": 518, "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
        ),
        1_136_480_768,
    ),
    "DINOv2 B with registers": (
        _transformers("vit", "Dinov2WithRegistersModel", "dinov2_with_registers", {"image_size": 518, "patch_size": 14}), 86_583_552,
    ),
}  # fmt: skip


def parameters(case: Case) -> int:
    """Parameters of our network for a config, without allocating any."""
    info = library.describe(*case)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(export.abstract(export.role_of(info, "case"), info)))


# --- ours and theirs on the same inputs


def inputs_of(info, kind: str) -> dict[str, np.ndarray]:
    """What the network is called with, three examples."""
    random, shape = np.random.RandomState(0), info["shape"]
    given = {"x": random.uniform(-1, 1, (3, *(shape if info["model"]["name"] != "flux" else (6, 10, shape[-1]))))}
    if kind == "denoiser":
        given["t"] = np.array([0.007, 0.5, 0.999])
    if kind == "autoencoder":
        given["z"] = random.standard_normal((3, 4, 4, info["model"]["latent_channels"]))
    for name, size in info["conditions"].items():
        given[name] = random.standard_normal((3, *([7, size[-1]] if name == "text" else size)))
    given = {k: v.astype(np.float32) for k, v in given.items()}
    if "label" in info["conditions"]:
        given["label"] = np.array([4, 0, 2])
    if "tokens" in info["conditions"]:
        given["tokens"] = np.array([[5, 9, 30, 1, 1, 1, 1], [7, 30, 3, 30, 30, 30, 30], [1, 2, 3, 4, 5, 6, 30]])
    return given


def ours(role, params, given) -> list[np.ndarray]:
    """Outputs of our network. Times are what the module itself is given; SiT goes through the meaning of its time and output."""
    given = {k: jnp.asarray(v) for k, v in given.items()}
    cond = {k: v for k, v in given.items() if k not in ("x", "t", "z")}
    module, variables = role.module, {"params": params}
    if module.kind == "denoiser":
        if role.scaling is not None and role.prediction == "velocity":
            return [role.net(params)(given["x"], given["t"], cond)]
        return [module.apply(variables, given["x"], given["t"], cond)]
    if module.kind == "autoencoder":
        return [module.apply(variables, given["x"], method="encode")[0], module.apply(variables, given["z"], method="decode")]
    if module.kind == "two_tower":
        return list(module.apply(variables, given["x"], cond))
    outputs = module.apply(variables, given["tokens"] if module.kind == "text_encoder" else given["x"])
    return list(outputs if type(module).__name__ != "T5Encoder" else outputs[:1])  # T5 has no pooled vector


def theirs(case: Case, model, module, info, given) -> list[np.ndarray]:
    """Outputs of the library's model, channels last."""
    import torch

    first = lambda v: torch.tensor(v).permute(0, 3, 1, 2)  # noqa: E731
    last = lambda v: v.permute(0, 2, 3, 1)  # noqa: E731
    given = {k: first(v) if v.ndim == 4 else torch.tensor(v) for k, v in given.items()}
    x, channels = given["x"], info["shape"][-1] if info["shape"] else 0
    with torch.no_grad():
        if case.model in ("dit", "sit"):
            t = 1 - given["t"] if case.model == "sit" else 1000 * given["t"]
            y = last(model(x, timestep=t, class_labels=given["label"]).sample[:, :channels])
            return [-y if case.model == "sit" else y]
        if case.model == "sd3":
            return [last(model(x, given["text"], given["pooled"], 1000 * given["t"]).sample)]
        if case.model == "flux":
            return [last(_flux(model, x, given))]
        if case.model == "unet":
            return [last(model(x, 1000 * given["t"], class_labels=given.get("label")).sample[:, :channels])]
        if case.model == "autoencoder_kl":
            return [last(model.encode(x).latent_dist.mean), last(model.decode(given["z"]).sample)]
        if case.model == "t5":
            return [model(given["tokens"]).last_hidden_state]
        if case.model == "clip_text":
            out = model(given["tokens"])
            return [out.last_hidden_state, out.text_embeds if module.features else out.pooler_output]
        tower = module if case.model != "clip" else module.tower("image")
        pixels = ((x + 1) / 2 - torch.tensor(tower.mean).reshape(3, 1, 1)) / torch.tensor(tower.std).reshape(3, 1, 1)
        if case.model == "clip":
            out = model(given["tokens"], pixels)
            return [out.image_embeds, out.text_embeds, model.logit_scale.exp()]
        # MAE shuffles what it keeps; equal noise would be no order, rising noise is the order of the image.
        noise = {"noise": torch.arange(9.0).expand(3, 9)} if case.name == "ViTMAEModel" else {}
        out = model(pixels, **noise)
        if case.model == "clip_vision":
            return [out.last_hidden_state[:, 1:], out.image_embeds if module.features else out.pooler_output]
        return [out.last_hidden_state[:, 1 + module.registers :], out.last_hidden_state[:, 0]]


def _flux(model, x, given):
    import torch
    from diffusers import FluxPipeline

    count, channels, height, width = x.shape
    y = model(
        FluxPipeline._pack_latents(x, count, channels, height, width), encoder_hidden_states=given["text"],
        pooled_projections=given["pooled"], timestep=given["t"], guidance=given.get("guidance"),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(given["text"].shape[1], 3),
    ).sample  # fmt: skip
    return FluxPipeline._unpack_latents(y, height, width, 1)


# --- files of the library


def make(case: Case):
    """The library's model of a case."""
    import diffusers
    import transformers

    if case.library == "diffusers":
        return getattr(diffusers, case.name)(**{k: v for k, v in case.config.items() if k != "_class_name"}).eval()
    if case.library == "original":
        return _with_the_papers_frequencies(diffusers.DiTTransformer2DModel(**DIT)).eval()
    kind = transformers.AutoConfig.for_model(case.config["model_type"], **{k: v for k, v in case.config.items() if k != "model_type"})
    return getattr(transformers, case.name)(kind, **_no_pooler(case)).eval()


def _no_pooler(case):
    return {"add_pooling_layer": False} if case.name == "ViTModel" else {}


def _with_the_papers_frequencies(model):
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def randomise(model):
    """Random values for every parameter and for SD3's table of positions; one embedder for all blocks of a DiT."""
    import torch

    if type(model).__name__ == "ViTMAEModel":  # its table of positions, which is only made for new networks
        for part in (model.embeddings.patch_embeddings.projection, model.embeddings.position_embeddings):
            part._is_hf_initialized = False
        model.embeddings.initialize_weights()
    generator = torch.Generator().manual_seed(0)
    stored = [(k, v) for k, v in model.named_buffers() if k == "pos_embed.pos_embed" and k in model.state_dict()]
    for name, value in sorted([*((k, v) for k, v in model.named_parameters() if v.requires_grad), *stored]):
        new = torch.randn(value.shape, generator=generator)
        new = new / math.sqrt(math.prod(value.shape[1:])) if value.ndim > 1 else 0.3 * new + name.endswith("weight")
        value.data.copy_(new)
    for block in getattr(model, "transformer_blocks", []):
        if getattr(block.norm1, "emb", None):
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


PAPERS_NAMES = {
    "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear",
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0", "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table", "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
}  # fmt: skip


def papers_place(key: str) -> tuple[str, int | None]:
    """(name in the papers' code, third) of a tensor of diffusers' DiT; third is 0, 1, 2 for q, k, v, whose rows are one tensor there."""
    *path, leaf = key.split(".")
    block = path[:2] if path[0] == "transformer_blocks" else []
    module = ".".join(path[len(block) :])
    inside = ["blocks", block[1]] if block and not module.startswith("norm1.emb") else []
    if module in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
        return ".".join([*inside, "attn.qkv", leaf]), "qkv".index(module[-1])
    return ".".join([*inside, PAPERS_NAMES[module], leaf]), None


def write(case: Case, model, folder):
    """The library's own files of its model."""
    if case.library != "original":
        return model.save_pretrained(folder)
    state = {"pos_embed": model.pos_embed.pos_embed.numpy()}
    for key, value in model.state_dict().items():  # q, k and v follow each other
        name, third = papers_place(key)
        state[name] = np.concatenate([state[name], value.numpy()]) if third else value.numpy()
    files.write(folder, "model", state)
    (folder / "config.json").write_text(json.dumps(case.config))


def read(case: Case, model, folder):
    """The library's model from files that we wrote; for the papers', the given one with the values of its renamed tensors."""
    if case.library != "original":
        loaded, report = type(model).from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False, **_no_pooler(case))
        if any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise SystemExit(f"{case.name} does not take what was written: {report}")
        return loaded.eval()
    import torch

    given, state = files.read(folder, "model"), {}
    for key in model.state_dict():
        name, third = papers_place(key)
        state[key] = torch.tensor(given[name] if third is None else np.split(given[name], 3)[third])
    model.load_state_dict(state)
    return model


class Result(NamedTuple):
    """Errors relative to the largest output, and whether files and parameters come back as they were."""

    parameters: int
    read: float
    written: float
    same: bool


def run(name: str) -> Result:
    """One case through files, both ways."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as work, _quiet():
        source, out = pathlib.Path(work, "theirs"), pathlib.Path(work, "ours")
        source.mkdir()
        model = randomise(make(case))
        write(case, model, source)
        params, info = library.load(source, case.library, case.model)
        role = export.role_of(info, name)
        given = inputs_of(info, role.module.kind)
        mine, wanted = ours(role, params, given), theirs(case, model, role.module, info, given)
        library.save(out, case.library, case.model, role.module, params, info)
        again, _ = library.load(out, case.library, case.model)
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        back = read(case, model, out).state_dict()
        same = kept.keys() == back.keys() and all(bool((kept[k] == back[k]).all()) for k in kept)
        same = same and all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
        # Other values than before, so that what is loaded is what was written and not what was there.
        params = jax.tree.map(lambda leaf: np.flip(leaf, -1).copy() if leaf.ndim else leaf, params)
        library.save(pathlib.Path(work, "changed"), case.library, case.model, role.module, params, info)
        changed = theirs(case, read(case, model, pathlib.Path(work, "changed")), role.module, info, given)
        written = error(changed, ours(role, params, given))
        return Result(sum(leaf.size for leaf in jax.tree.leaves(params)), error(mine, wanted), written, same)


def error(found, wanted) -> float:
    """Largest difference of several arrays, each relative to its largest value."""
    found, wanted = ([np.asarray(v) for v in values] for values in (found, wanted))
    if [v.shape for v in found] != [v.shape for v in wanted]:
        raise SystemExit(f"shapes {[v.shape for v in found]} and {[v.shape for v in wanted]}")
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True))


@contextlib.contextmanager
def _quiet():
    """The libraries' progress bars and remarks, not shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as missing:
        sys.exit(f"error: this needs torch, diffusers and transformers ({missing})")
    if unknown := {*ONLY.value} - {*CASES}:
        sys.exit(f"error: no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print("| case | class | parameters | read: error | written: error | bit for bit |\n|---|---|---|---|---|---|")
    bad = []
    for name in ONLY.value or CASES:
        found = run(name)
        errors = f"{found.read:.1e} | {found.written:.1e} | {'yes' if found.same else 'NO'}"
        print(f"| {name} | {CASES[name].name} | {found.parameters:,} | {errors} |", flush=True)
        bad += [name] if max(found.read, found.written) > 1e-4 or not found.same else []
    if not ONLY.value:
        print("\n| published | class | parameters of ours | as published |\n|---|---|---|---|")
        for name, (case, count) in PUBLISHED.items():
            mine = parameters(case)
            print(f"| {name} | {case.name} | {mine:,} | {count:,} |", flush=True)
            bad += [name] if mine != count else []
    if bad:
        sys.exit(f"error: {', '.join(bad)}")


if __name__ == "__main__":
    app.run(main)
