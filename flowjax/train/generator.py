"""A network from an export or a workdir, ready to sample: what every binary, tool and study that samples goes through."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import generate
from flowjax.config import ConfigError
from flowjax.models import sharding
from flowjax.train import export
from flowjax.train import mesh as mesh_lib


class Generator(NamedTuple):
    """Call it for samples; `info` describes the network (flowjax.train.export), params are its own and those of its companions.

    They are made on all devices of this process, each of which has the parameters and makes some of a batch's rows. Of several
    processes each makes what it is asked for.
    """

    sample: Any
    params: Any
    info: dict

    def __call__(self, cond: dict, count: int, seed: int = 0, batch: int = 0, first: int = 0) -> np.ndarray:
        """(count, ...) samples for cond, one row a sample: {"label": (count,)}, {"tokens": (count, L)} or {}; batch 0 is the run's
        evaluate.batch; first: number of the first of them among the samples of this seed."""
        batch = batch or self.info["config"]["evaluate"]["batch"]
        devices = jax.local_device_count()
        return generate.run(self.sample, self.params, cond, count, seed=seed, batch=batch, first=first, multiple=devices)


def second_network(guidance, shape):
    """(guidance section without its checkpoint, the callable that the guidance takes besides the model).

    A section of `autoguidance` or `classifier` guidance names a second network by `checkpoint` (and `weights`): the worse
    denoiser, or a classifier of noisy images.
    """
    if not isinstance(guidance, dict) or "checkpoint" not in guidance:
        return guidance, {}
    section = dict(guidance)
    source, weights = section.pop("checkpoint"), section.pop("weights", "ema")
    role, params, info = export.load(source, weights, where="sample.guidance")
    if tuple(info["shape"]) != tuple(shape):
        raise ConfigError(f"sample.guidance: {source} works on {tuple(info['shape'])}, the guided network on {tuple(shape)}")
    net = role.net(export.local(params))
    if role.module.kind == "denoiser":
        return section, {"bad": net}
    if role.module.kind != "classifier" or not role.module.time:
        raise ConfigError(f"sample.guidance: {source} is neither a denoiser nor a classifier of noisy images (model.time = True)")

    def log_prob(x_t, t, cond):
        if "label" not in cond:
            raise ConfigError("guidance by a classifier asks for a class, and this network is not asked for one")
        return jnp.take_along_axis(jax.nn.log_softmax(net(x_t, t=t)), cond["label"][:, None], axis=1)[:, 0]

    return section, {"log_prob": log_prob}


def load(source, weights: str = "ema", settings: dict | None = None) -> Generator:
    """The Generator of a checkpoint. settings: steps, sampler, grid, guidance, negative (a prompt), which
    are the run's own where not given; and size, (height, width) of the images."""
    role, params, info = export.load(source, weights)
    return build(role, params, info, source, settings)


def build(role, params, info, source, settings: dict | None = None, decode: bool = True) -> Generator:
    """`load` for a network that is loaded already; decode: whether a network of latents makes images of them."""
    if role.module.kind != "denoiser":
        raise ConfigError(f"{source} is a network of kind {role.module.kind!r}, which makes no samples")
    options = chosen(info, settings or {})
    guidance, besides = second_network(options.pop("guidance"), info["shape"])
    shape = tuple(info["shape"])
    if size := options.pop("size", None):
        shape = resized(info, size)
    if prompt := options.pop("negative"):
        options["negative"] = {"tokens": export.tokenizer_of(source, info)([prompt], "sample.negative")}
    elif info.get("null") == "empty prompt" and info.get("text") and guidance != "none":
        options["null"] = {"tokens": export.tokenizer_of(source, info)([""], "the empty prompt")}
    found = {k: export.companion_of(source, info, k, f"checkpoint: {k}") for k in ("vae", "text") if decode or k != "vae"}
    roles = {k: its for k, (its, *_) in ((k, v) for k, v in found.items() if v)}

    mesh = mesh_lib.make_mesh(devices=jax.local_devices())

    def sample(weights, *asked):
        params, others = weights  # of every network, so that none of them is a constant of the program
        nets = {k: its.net(others[k]) for k, its in roles.items()}
        how = {"guidance": guidance, "besides": besides, "codec": nets.get("vae"), "text": nets.get("text"), **options}
        with sharding.use(mesh):
            return generate.make(role, shape, **how)(params, *asked)

    everywhere, rows = jax.NamedSharding(mesh, jax.P()), mesh_lib.batch_sharding(mesh)
    sample = jax.jit(sample, in_shardings=(everywhere, everywhere, rows, rows), out_shardings=rows)
    weights = export.local((params, {k: found[k][1] for k in roles}))
    return Generator(sample, jax.device_put(weights, everywhere), info)


def resized(info, size):
    """Shape of what the network makes for images of size (height, width)."""
    trained, image = tuple(info["shape"]), tuple(info["image_shape"])
    factor = image[0] // trained[0]
    if len(trained) != 3 or any(n < 1 or n % factor for n in size):
        raise ConfigError(f"--size={'x'.join(map(str, size))} should be positive multiples of {factor}, for a network of images")
    return size[0] // factor, size[1] // factor, trained[2]


def chosen(info, settings: dict) -> dict:
    """The sampling settings of the run that trained the network, with `settings` in their place."""
    section = info["config"]["sample"]
    own = {k: section[k] for k in ("steps", "sampler", "grid", "guidance")} | {"negative": section.get("negative", "")}
    if settings.get("guidance") == "none":
        own["negative"] = ""  # of the guidance that was left out
    return own | settings


def reconstructions(role, params, x, batch: int):
    """Posterior-mean reconstructions of x (N, H, W, C) by an autoencoder."""
    params = export.local(params)
    fn = jax.jit(lambda p, x: role.net(p).reconstruct(x))
    return np.concatenate([np.asarray(fn(params, x[i : i + batch])) for i in range(0, len(x), batch)])
