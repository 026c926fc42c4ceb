"""Roles: networks by name, and where each one's parameters come from.

A role is a module with, for denoisers, the path and prediction that give its output a meaning. `role.net(params)` is the
callable that objectives and samplers see.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax import models, paths, predictions
from flowjax.config import ConfigError, bind, build, lookup
from flowjax.models import tiling, vae
from flowjax.train import lora as lora_lib
from flowjax.train.inversion import Inversion


@dataclasses.dataclass(frozen=True)
class Bound:
    """A module closed over its parameters, called by method name: the net of roles that are not denoisers."""

    module: nn.Module
    params: Any

    def __call__(self, *args, **kwargs):
        return self.module.apply({"params": self.params}, *args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("_") or not hasattr(type(self.module), name):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.module.apply({"params": self.params}, *args, method=name, **kwargs)


@dataclasses.dataclass(frozen=True)
class Latents:
    """A frozen autoencoder with the statistics of its latents, as a codec between images and normalised latents.

    tile > 0: images larger than tile x tile pixels go through in such tiles, which overlap by a quarter (flowjax.models.tiling).
    """

    net: Bound
    stats: vae.LatentStats
    tile: int = 0

    def encode(self, x):
        """Images (B, H, W, C) -> posterior means, standardised per channel."""
        return vae.normalise(self._through(lambda x: self.net.encode(x)[0], x, self.tile), self.stats)

    def reconstruct(self, x):
        """Images through the posterior's mean and back."""
        return self.net.reconstruct(x)

    def decode(self, latent):
        """Standardised latents -> images."""
        return self._through(self.net.decode, vae.denormalise(latent, self.stats), self.tile // self.net.module.factor)

    def _through(self, fn, x, tile: int):
        return tiling.tiled(fn, x, tile, tile // 4) if self.tile and max(x.shape[1:3]) > tile else fn(x)


@dataclasses.dataclass(frozen=True)
class Role:
    """module + meaning. `scaling` is that of models.denoiser; `latents` holds an exported autoencoder's {"mean", "std"}; with
    `lora` (flowjax.train.lora) what is trained, averaged and stored of it is an adapter, and the network's own parameters are
    frozen."""

    module: nn.Module
    path: paths.Path | None = None
    prediction: str | None = None
    scaling: Callable | None = None
    latents: Mapping[str, Any] | None = None
    lora: lora_lib.Lora | Inversion | None = None

    def whole(self, params, base=None):
        """The network's parameters, whose trained ones are `params`: these, or those of `base` with the adapter `params` in
        them."""
        return params if self.lora is None else lora_lib.merge(base, [(params, lora_lib.scale_of(self.lora), 1.0)])

    def trained(self, key, boxed, where: str = "lora"):
        """What is trained of these boxed parameters: all, or a fresh adapter of them."""
        return boxed if self.lora is None else self.lora.fresh(key, boxed, where)

    def net(self, params):
        """The callable of this role: a Model, a Latents codec or a Bound module."""
        if self.module.kind == "denoiser":
            return models.denoiser(self.module, params, self.path, self.prediction, self.scaling)
        bound = Bound(self.module, params)
        if self.latents is not None:
            return Latents(bound, vae.LatentStats(*(np.asarray(self.latents[k], np.float32) for k in ("mean", "std"))))
        return bound

    def init(self, key, x, cond):
        """Boxed parameters (with logical axis names) for inputs shaped like x (B, ...) and cond."""
        if self.module.kind == "denoiser":
            variables = self.module.init(key, x, jnp.zeros(x.shape[:1], jnp.float32), cond)
        elif self.module.kind == "autoencoder":
            variables = self.module.init(key, x, key)
        elif self.module.kind in ("discriminator", "perceptual", "image_encoder"):
            variables = self.module.init(key, x)
        elif self.module.kind == "language_model":
            variables = self.module.init(key, x.astype(jnp.int32))
        elif self.module.kind == "text_encoder":
            variables = self.module.init(key, cond["tokens"])
        elif self.module.kind in ("two_tower", "reward"):
            variables = self.module.init(key, x, cond)
        else:
            t = jnp.zeros(x.shape[:1], jnp.float32) if self.module.time else None
            variables = self.module.init(key, x, t=t)
        return variables["params"]


def build_role(model, path, prediction: str, where: str, latents=None, input_scaling="none") -> Role:
    """The role that config sections describe; ConfigError names `where` when something does not fit.

    input_scaling: "none", for x_t and t as they are, or a section of predictions.INPUT_SCALINGS; it keeps the variance of the
    network's input at one on paths, such as edm and ve, where that of x_t grows.
    """
    module = models.build(model, where)
    if module.kind != "denoiser":
        return Role(module, latents=latents)
    lookup(predictions.PREDICTIONS, prediction, where.replace("model", "prediction"))
    scaling = None
    if input_scaling != "none":
        scaling = bind(predictions.INPUT_SCALINGS, input_scaling, where.replace("model", "input_scaling"), ("path", "t"))
    return Role(module, build(paths.PATHS, path, where.replace("model", "path")), prediction, scaling)


def shape_of(tree):
    """{path: shape} of a parameter tree, for comparisons in error messages."""
    return {jax.tree_util.keystr(k, simple=True, separator="/"): tuple(v.shape) for k, v in jax.tree.leaves_with_path(tree)}


def same_shapes(found, wanted, what: str):
    """ConfigError with a short diff when two parameter trees differ in names or shapes."""
    found, wanted = shape_of(found), shape_of(wanted)
    lines = [f"  {k}: has {found.get(k, 'nothing')}, needs {wanted.get(k, 'nothing')}" for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
    if lines:
        more = [f"  ... and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise ConfigError("\n".join([f"{what} does not fit the model:", *lines[:8], *more]))


def domain(role: Role, info: Mapping[str, Any]) -> dict[str, Any]:
    """What examples and conditions a denoiser was made for, by the info of its export or workdir; None where that is not known.

    The length of a text is free, as networks take any; that of token ids is not.
    """
    data, shapes = info.get("data") or {}, info.get("conditions") or {}
    return {
        "shape": tuple(info["shape"]),
        "latent space": info.get("latent_space"),
        "number of classes": getattr(role.module, "num_classes", 0),
        "set of conditions": {k: tuple(v[-1:]) for k, v in sorted(shapes.items()) if k != "label"},
        "text encoder": (info.get("frozen") or {}).get("text"),
        "tokenizer": (data.get("tokenizer") or {}).get("sha256"),
    }


def same_domain(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str):
    """ConfigError that names the first entry in which two domains differ; what is not known of one of them does not count."""
    for what, mine in wanted.items():
        if None not in (found[what], mine) and found[what] != mine:
            raise ConfigError(f"{where} was trained with another {what} than this run's: {found[what]} is not {mine}")
