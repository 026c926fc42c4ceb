"""Networks of other libraries, config and weights: files -> (parameters, info of an export), and back.

Parameters are float32 here: float16 and bfloat16 files are read without loss, and written back bit for bit in their own dtype.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from flowjax import models
from flowjax.config import ConfigError, lookup
from flowjax.interop import clip, dit, encoder, files, flux, mmdit, original, t5, unet, vae, vit
from flowjax.interop import diffusers_configs as D
from flowjax.interop import transformers_configs as T
from flowjax.interop.fields import Fields
from flowjax.train import export, settings
from flowjax.train.assembly import NETWORK


class Kind(NamedTuple):
    """How networks of one kind are read and written.

    module: our class.   read, write: config <-> info, see `flowjax.interop.fields`.
    from_torch(net, state, like) -> params; to_torch(net, params) -> state.
    classes: what _class_name may be; the first is written.   buffers(net, info): their tensors that are no parameters of ours.
    """

    module: type[nn.Module]
    read: Callable
    write: Callable
    from_torch: Callable
    to_torch: Callable
    classes: tuple[str, ...] = ()
    buffers: Callable = lambda net, info: {}


def _old_attention(from_torch):
    """`from_torch` that reads the names which attention had in diffusers before 0.17 as well."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    rule = rf"(attentions\.\d+)\.({'|'.join(names)})\.", lambda m: f"{m[1]}.{names[m[2]]}."
    return lambda net, state, like: from_torch(net, encoder.renamed(state, [rule]), like)


def _t5_of_files(net, params):
    """T5 as files have it, with one name for the token table."""
    return {k: v for k, v in t5.to_torch(net, params).items() if k != t5.TOKENS}


def _clip_of_files(net, params):
    """CLIP as files have it, whose towers by themselves keep the prefix that they have in both."""
    state = clip.to_torch(net, params)
    if isinstance(net, clip.CLIP) or net.features:
        return state
    prefix = clip.PREFIX["text" if isinstance(net, clip.CLIPText) else "image"]
    return {f"{prefix}.{key}": value for key, value in state.items()}


def _vit_of_files(net, params):
    """ViT and DINOv2 as files have them, in names that transformers 5 writes and 4 knows."""
    state = vit.to_torch(net, params)
    for key in [key for key in state if ".mlp.gate_proj." in key]:
        both = state.pop(key), state.pop(key.replace("gate_proj", "up_proj"))
        state[key.replace("gate_proj", "weights_in")] = np.concatenate(both)
    parts = {"q": "query", "k": "key", "v": "value"}
    rules = [
        (r"^layers\.", "encoder.layer."),
        (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{parts[m[1]]}."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    ]
    if not net.layerscale:
        rules += [(r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense.")]
    return encoder.renamed(state, rules)


def _places(net, info):
    return {original.TABLE: original.table(net, info["shape"][0] // net.patch)}


M = models.MODELS
KINDS: dict[str, dict[str, Kind]] = {
    "diffusers": {
        "dit": Kind(M["dit"], D.read_dit, D.write_dit, dit.from_torch, dit.to_torch, ("DiTTransformer2DModel", "Transformer2DModel")),
        "sd3": Kind(M["mmdit"], D.read_sd3, D.write_sd3, mmdit.from_torch, mmdit.to_torch, ("SD3Transformer2DModel",)),
        "flux": Kind(M["flux"], D.read_flux, D.write_flux, flux.from_torch, flux.to_torch, ("FluxTransformer2DModel",)),
        "unet": Kind(M["unet"], D.read_unet, D.write_unet, _old_attention(unet.from_torch), unet.to_torch, ("UNet2DModel",)),
        "autoencoder_kl": Kind(
            M["autoencoder_kl"], D.read_autoencoder, D.write_autoencoder, _old_attention(vae.from_torch), vae.to_torch, ("AutoencoderKL",)
        ),
    },
    "transformers": {
        "clip_text": Kind(M["clip_text"], T.read_clip_text, T.write_clip_text, clip.from_torch, _clip_of_files),
        "clip_vision": Kind(M["clip_vision"], T.read_clip_vision, T.write_clip_vision, clip.from_torch, _clip_of_files),
        "clip": Kind(M["clip"], T.read_clip, T.write_clip, clip.from_torch, _clip_of_files),
        "t5": Kind(M["t5"], T.read_t5, T.write_t5, t5.from_torch, _t5_of_files),
        "vit": Kind(M["vit"], T.read_vit, T.write_vit, vit.from_torch, _vit_of_files),
    },
    "original": {
        "dit": Kind(M["dit"], original.read_dit, original.write_dit, original.from_torch, original.to_torch, (), _places),
        "sit": Kind(M["dit"], original.read_sit, original.write_sit, original.from_torch_sit, original.to_torch_sit, (), _places),
    },
}
# Names of the weight files, and the fields that every config of the library has.
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model", "original": "model"}
COMMON = {"diffusers": D.COMMON, "transformers": T.COMMON, "original": ()}


def kind_of(library: str, model: str) -> Kind:
    """The entry of KINDS."""
    return lookup(lookup(KINDS, library, "library"), model, f"model of {library}")


def describe(library: str, model: str, config: Mapping, where: str = "config.json", fields=None, size=None, meaning=None) -> dict:
    """The info of an export (flowjax.train.export) of the network that a library's config describes.

    fields: of our model section, which their config does not say or which are wanted otherwise ({"dtype": "bfloat16"}).
    size: (height, width) of what a denoiser is to make, where it is not what the config says.
    meaning: path, prediction and input_scaling where they are not those that networks of this kind usually have.
    """
    kind = kind_of(library, model)
    name = config.get("_class_name", kind.classes[0] if kind.classes else None)
    if kind.classes and name not in kind.classes:
        raise ConfigError(f"{where} is of a {name}; --model={model} of {library} is {' or '.join(kind.classes)}")
    left = Fields(config, where, COMMON[library])
    try:
        found = kind.read(left)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: a field is not what it should be ({error})") from None
    left.done()
    found["model"] |= dict(fields or {})
    if size and found["shape"]:
        found["shape"] = [*size, found["shape"][-1]]
    if None in found["shape"]:
        raise ConfigError(f"{where} does not say the size of the images: give --size")
    return info_of(found, {"library": library, "model": model, "config": dict(config)}, meaning)


def info_of(found: Mapping, source: Mapping, meaning: Mapping | None = None) -> dict:
    """The info of an export of what was found in a config: {"model", "shape", "conditions", ...}, made from `source`."""
    base = settings.defaults()
    network = {k: (meaning or {}).get(k) or found.get(k, base[k]) for k in NETWORK if k != "model"} | {"model": found["model"]}
    sections = {"sample": {**base["sample"], "count": 16, **found.get("sample", {})}, "evaluate": {**base["evaluate"], "batch": 16}}
    info = {
        **network, "shape": found["shape"], "image_shape": found["shape"], "num_classes": found.get("num_classes", 0),
        "conditions": found["conditions"], "text": None, "data": {}, "frozen": {}, "step": 0, "weights": "imported",
        "config": {**base, **network, **sections}, "source": source,
    }  # fmt: skip
    return settings.plain(info | {k: found[k] for k in ("latents", "null") if k in found})


def load(source, library: str, model: str, config=None, **options) -> tuple[dict, dict]:
    """(params, info) of a library's folder or weight file: float32 parameters and what describes them.

    config: their config as a dict; by default config.json beside the weights. options: see `describe`. ConfigError says what
    is missing, left over, of another shape, or not supported; nothing is skipped but what `flowjax.interop` says of its models.
    """
    kind, where = kind_of(library, model), "the given config"
    if config is None:
        path = pathlib.Path(source)
        where = (path.parent if path.is_file() else path) / "config.json"
        config = files.read_json(where)
    info = describe(library, model, config, str(where), **options)
    role = export.role_of(info, str(where))
    try:
        like = export.abstract(role, info)
        state = files.read(source, STEMS[library])
        params = kind.from_torch(role.module, state, like)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    info["source"]["dtypes"] = sorted({str(value.dtype) for value in state.values()})
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), info


def state_of(library: str, model: str, module, params, info) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, state dict) in a library's words; ConfigError where the network cannot be expressed in it.

    A projector (REPA) serves training only and is left out.
    """
    kind = kind_of(library, model)
    if type(module) is not kind.module:
        raise ConfigError(f"the network is a {type(module).__name__}; --model={model} of {library} is a {kind.module.__name__}")
    if getattr(module, "projector", None):
        module, params = module.clone(projector=None), {k: v for k, v in params.items() if k != "projector"}
    config = kind.write(module, info)
    try:
        return config, kind.to_torch(module, jax.tree.map(np.asarray, params)) | kind.buffers(module, info)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def save(out, library: str, model: str, module, params, info, dtype: str = "float32", shard: int = files.SHARD) -> dict:
    """Write the folder `out` (config.json and weights) that the library's from_pretrained reads. Returns the config."""
    config, state = state_of(library, model, module, params, info)
    with files.whole(out) as folder:
        files.write(folder, STEMS[library], state, dtype, shard)
        named = config | ({"dtype": dtype} if library == "transformers" else {})
        (folder / "config.json").write_text(json.dumps(named, indent=2, sort_keys=True) + "\n")
    return config


def decoded(info: dict, autoencoder: dict) -> dict:
    """The info of a denoiser whose latents the autoencoder of another info decodes; ConfigError where they do not match."""
    module = export.role_of(autoencoder, "vae").module
    if module.kind != "autoencoder" or not autoencoder.get("latents"):
        raise ConfigError("not an autoencoder with measured latents")
    height, width, channels = info["shape"]
    if channels != module.latent_channels:
        raise ConfigError(f"its latents have {module.latent_channels} channels, the network makes {channels}")
    return info | {"image_shape": [height * module.factor, width * module.factor, module.image_channels]}
