"""The networks, by name. A config's model section is {"name": ..., fields} or {"name": ..., "preset": ..., other fields}."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from flowjax.config import ConfigError, check, lookup, refuse_unread, split
from flowjax.models.classifier import Classifier
from flowjax.models.discriminator import FeatureHead, PatchGAN
from flowjax.models.clip import CLIP, CLIPText, CLIPVision
from flowjax.models.dit import DiT
from flowjax.models.flux import Flux
from flowjax.models.jit import JiT
from flowjax.models.language import LanguageModel
from flowjax.models.mae import MAE
from flowjax.models.mixture import Mixture
from flowjax.models.mlp import MLP
from flowjax.models.mmdit import MMDiT
from flowjax.models.perceptual import LPIPS
from flowjax.models.reward import Reward
from flowjax.models.t5 import T5Encoder
from flowjax.models.text import TextTransformer
from flowjax.models.text_encoders import TextEncoders
from flowjax.models.two_tower import TwoTower
from flowjax.models.unet import UNet
from flowjax.models.vae import AutoencoderKL
from flowjax.models.vit import ViT
from flowjax.paths import Path, expand
from flowjax.predictions import Model

MODELS: dict[str, type[nn.Module]] = {
    "autoencoder_kl": AutoencoderKL,
    "classifier": Classifier,
    "clip": CLIP,
    "clip_text": CLIPText,
    "clip_vision": CLIPVision,
    "dit": DiT,
    "feature_head": FeatureHead,
    "flux": Flux,
    "jit": JiT,
    "language_model": LanguageModel,
    "lpips": LPIPS,
    "mae": MAE,
    "mixture": Mixture,
    "mlp": MLP,
    "mmdit": MMDiT,
    "patch_gan": PatchGAN,
    "reward": Reward,
    "t5": T5Encoder,
    "text": TextTransformer,
    "text_encoders": TextEncoders,
    "two_tower": TwoTower,
    "unet": UNet,
    "vit": ViT,
}


def build(section: Mapping[str, Any] | str, where: str = "model") -> nn.Module:
    """The module that a config section describes; ConfigError on an unknown, missing, mistyped or contradictory setting.

    `preset` names an entry of the class's `presets`. A field that the preset fixes may be repeated, not changed.
    """
    name, settings = split(section, where)
    module = lookup(MODELS, name, f"{where}.name")
    given = {k: v for k, v in settings.items() if k != "preset"}
    if preset := settings.pop("preset", None):
        fixed = lookup(getattr(module, "presets", {}), preset, f"{where}.preset")
        for key in fixed.keys() & settings.keys():
            if settings[key] != fixed[key]:
                raise ConfigError(f"{where}.{key} = {settings[key]!r} contradicts preset {preset!r}, where it is {fixed[key]!r}")
        settings = {**settings, **fixed}
    return refuse_unread(module(**check(module, settings, where, given=("parent", "name"))), given, where)


def denoiser(module: nn.Module, params, path: Path, prediction: str, scaling: Callable | None = None) -> Model:
    """The network with these (unboxed) parameters as a `Model`; a key given at a call switches dropout on.

    scaling: what stands between x_t, t and the network's input, with its settings bound (predictions.INPUT_SCALINGS).
    """

    def apply(x_t, t, cond, key, **options):
        if scaling is not None:
            factor, t = scaling(path, t)
            x_t = expand(factor, x_t) * x_t
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, x_t, t, cond or {}, train=key is not None, rngs=rngs, **options)

    project = functools.partial(apply, project=True) if getattr(module, "projector", None) else None
    # Without a condition there is nothing to drop and nothing to guide by: None makes both an error instead of no effect.
    null = module.null if getattr(module, "has_null", True) else None
    takes = {k: getattr(module, k, False) for k in ("guidance_embed", "step_embed")}
    of = lambda params: denoiser(module, params, path, prediction, scaling)  # noqa: E731
    return Model(apply, path, prediction, null, project=project, params=params, of=of, **takes)
