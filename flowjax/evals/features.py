"""Feature networks for distances between image sets, named for what they are.

A number made with one of these is FD-<net>-<hash8>@<N>. It is never "FID", which means one particular Inception graph, and never
stands beside published FIDs. Every entry of FEATURES is fitted on the TRAIN split only and compared on the held-out split.
"""

import functools
import hashlib
import inspect
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowjax.config import ConfigError, build
from flowjax.evals import processes
from flowjax.evals.image import dequantise
from flowjax.models.classifier import Classifier


@dataclass(frozen=True)
class Features:
    """A frozen map from uint8 images (N, H, W, C) to float64 features (N, d); `hash` covers its weights."""

    net: str
    hash: str
    dim: int
    apply: Callable[[np.ndarray], np.ndarray]

    @property
    def name(self) -> str:
        return f"{self.net}-{self.hash[:8]}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.apply(images), np.float64)


def fingerprint(*parts) -> str:
    """sha256 over arrays (dtype, shape and bytes) and anything else (its repr)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part))
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def pixels(images: np.ndarray) -> Features:
    """The flattened image itself in [-1, 1]: sees global colour, layout and blur."""
    dim = int(np.prod(images.shape[1:]))
    return Features("pixels", fingerprint("pixels", images.shape[1:]), dim, lambda x: dequantise(x).reshape(len(x), -1))


def pca(images: np.ndarray, dim: int = 64) -> Features:
    """The leading `dim` principal components of the train pixels: keeps the sample count above the feature count."""
    flat = dequantise(images).reshape(len(images), -1).astype(np.float64)
    if not 1 <= dim <= min(flat.shape):
        raise ConfigError(f"pca.dim = {dim} must lie in 1..{min(flat.shape)} for train images of shape {images.shape}")
    mean = flat.mean(0)
    centred = flat - mean
    if len(flat) >= flat.shape[1]:
        basis = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dim]
    else:  # the same directions from the smaller of the two products
        values, rows = (v[..., ::-1][..., :dim] for v in np.linalg.eigh(centred @ centred.T))
        if not values[-1] > 1e-9 * values[0]:
            raise ConfigError(f"pca.dim = {dim}: {len(flat)} train images span fewer directions")
        basis = centred.T @ rows / np.sqrt(values)
    mean, basis = processes.agree(mean), processes.agree(basis)
    return Features("pca", fingerprint(mean, basis), dim, lambda x: (dequantise(x).reshape(len(x), -1) - mean) @ basis)


def _fit(net: Classifier, images: np.ndarray, labels: np.ndarray, steps: int, batch: int, seed: int) -> list[np.ndarray]:
    """Parameter leaves after `steps` of the one train step on the classification objective, images shifted by up to a pixel.

    Deterministic in `seed` on one platform.
    """
    from flowjax import objectives
    from flowjax.train import optim
    from flowjax.train.roles import Role
    from flowjax.train.step import State, make_step

    role, x, rng = Role(net), dequantise(images), np.random.default_rng(seed)
    params = nn.meta.unbox(jax.jit(lambda key: role.init(key, x[:1], {}))(jax.random.key(seed)))
    section = {"name": "adamw", "schedule": {"name": "cosine", "rate": 2e-3}}
    transform, _ = optim.build(section, params, steps)
    objective = objectives.build({"name": "classification", "shift": 1, "smoothing": 0.1})
    step = jax.jit(make_step(objective, {"net": role}, {"net": transform}, {}, seed=seed), donate_argnums=0)
    state = State(jnp.zeros((), jnp.int32), {"net": params}, {"net": transform.init(params)}, {})
    epochs = -(-steps * batch // len(x))
    order = np.concatenate([rng.permutation(len(x)) for _ in range(epochs)])
    for i in range(steps):
        index = order[i * batch : (i + 1) * batch]
        state, _ = step(state, {}, {"x": x[index], "cond": {"label": labels[index].astype(np.int32)}})
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params["net"])]


def classifier(
    images: np.ndarray,
    labels: np.ndarray,
    width: int = 16,
    stages: int = 3,
    dim: int = 64,
    steps: int = 300,
    batch: int = 128,
    seed: int = 0,
    cache: str | os.PathLike | None = None,
) -> Features:
    """Penultimate layer of a small convolutional classifier trained on the train split: sees class content, less of texture.

    With `cache`, a folder, the weights are kept under a hash of the data, the recipe and the code that trains, so that a change
    of any of them trains anew.
    """
    net = Classifier(int(labels.max()) + 1, width, stages, dim)
    code = inspect.getsource(Classifier) + inspect.getsource(_fit)
    key = fingerprint(images, np.asarray(labels, np.int64), code, net, steps, batch, seed)
    path = None if cache is None else pathlib.Path(cache) / f"classifier-{key[:16]}.npz"
    shapes = nn.meta.unbox(jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *images.shape[1:]))))["params"]
    treedef = jax.tree.structure(shapes)
    if path is not None and path.exists():
        with np.load(path) as stored:
            leaves = [stored[f"leaf{i}"] for i in range(treedef.num_leaves)]
    else:
        leaves = _fit(net, images, labels, steps, batch, seed)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.tmp.npz")  # renamed when whole: a reader never meets half a file
            np.savez(partial, **{f"leaf{i}": leaf for i, leaf in enumerate(leaves)})
            os.replace(partial, path)
    leaves = [processes.agree(leaf) for leaf in leaves]
    return _penultimate("classifier", net, jax.tree.unflatten(treedef, leaves))


def network(images: np.ndarray, checkpoint: str, weights: str = "ema") -> Features:
    """Penultimate layer of a classifier trained by a run of its own (objective `classification`): an export or a workdir."""
    from flowjax.train import export

    role, params, info = export.load(checkpoint, weights, where="evals.features")
    params = export.local(params)
    if role.module.kind != "classifier" or role.module.time or tuple(info["shape"]) != images.shape[1:]:
        raise ConfigError(f"evals.features: {checkpoint} is no classifier of clean images of shape {images.shape[1:]}")
    return _penultimate("network", role.module, params)


def _penultimate(name: str, net: Classifier, params) -> Features:
    @jax.jit
    def penultimate(x):
        # Full float32 products on every platform: accelerators default to less, and a distance would shift with the hardware.
        with jax.default_matmul_precision("highest"):
            return net.apply({"params": params}, x, features=True)

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return Features(name, fingerprint(net, *leaves), net.features, functools.partial(_in_batches, penultimate))


def _in_batches(fn: Callable, images: np.ndarray, size: int = 512) -> np.ndarray:
    """fn over uint8 images in batches of one shape, the last one padded: one compilation whatever the count."""
    out = []
    for start in range(0, len(images), size):
        batch = dequantise(images[start : start + size])
        padding = [(0, size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        out.append(np.asarray(fn(np.pad(batch, padding)))[: len(batch)])
    return np.concatenate(out)


FEATURES = {"pixels": pixels, "pca": pca, "classifier": classifier, "network": network}


def extractor(section, images: np.ndarray, labels: np.ndarray, cache=None) -> Features:
    """Build the FEATURES entry that `section` names, fitted on the train split's uint8 images and labels."""
    return build(FEATURES, section, "evals.features", images=images, labels=labels, cache=cache)
