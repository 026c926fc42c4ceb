"""Samples from a role: path, grid, sampler, guidance and codec put together, in batches, reproducibly.

All randomness of sample i is a function of (seed, i): a set of samples does not change with the batch size or the sharding.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import conditions, editing, samplers, times
from flowjax.config import ConfigError, build, keywords
from flowjax.guidance import GUIDANCE


def make(
    role, shape, *, steps: int = 50, sampler="heun", grid="uniform", guidance="none", codec=None, text=None, negative=None, null=None,
    edit=None, besides=None,
):
    """sample(params, seed, indices (B,), cond) -> (B, ...) data, to be jitted.

    shape: of one (latent) example. sampler, grid, guidance: config sections ("none" for no guidance). codec: Latents of a
    frozen autoencoder, which decodes the result. text: frozen text encoder, which embeds cond["tokens"], where there are such.
    negative: condition of one row to guide away from, in place of the network's null condition; null: the same, where it is what no
    prompt means to the network and not what the user asked for. edit: an image to begin with or
    to keep a part of (flowjax.editing.Edit), in pixels; `steps` are those from its strength on. besides: what the guidance takes
    besides the model ({"bad": Model}, ...).
    """
    if role.module.kind != "denoiser":
        raise ConfigError(f"a network of kind {role.module.kind!r} cannot be sampled; only denoisers can")
    if steps < 1:
        raise ConfigError(f"sample.steps = {steps} should be at least 1")
    path = role.path
    if negative is not None and guidance == "none":
        raise ConfigError("a negative prompt needs guidance")
    grid = keywords(grid)
    if edit is not None:
        if edit.strength < 1:
            if "t_start" in grid:
                raise ConfigError(f"the strength of an edit is where sampling starts; sample.grid has t_start = {grid['t_start']} already")
            grid["t_start"] = edit.strength
        inner = editing.check(edit if codec is None else editing.encoded(edit, codec), shape, path)
    at = times.grid(steps, path, prediction=role.prediction, **grid)

    def sample(params, seed, indices, cond):
        model, heard = role.net(params), []
        if text is not None:
            cond = conditions.embed(text, cond)
        if (avoided := null if negative is None else negative) is not None:
            other, nothing = avoided if text is None else conditions.embed(text, avoided), model.null

            def away(c):
                heard.append(c)
                return {**(nothing(c) if nothing else c), **{k: jnp.broadcast_to(v, c[k].shape) for k, v in other.items()}}

            model = model.replace(null=away)
        if guidance != "none":
            model = build(GUIDANCE, guidance, "sample.guidance", model=model, **(besides or {}))
        start, walk = keys(seed, indices)
        x = samplers.noise(path, start, (len(indices), *shape), at[0])
        if edit is not None:
            seen = inner.image if edit.strength < 1 else inner.image * inner.keep
            x = x + path.a(jnp.float32(at[0])) * seen
            model = model if inner.keep is None else editing.keeping(model, inner.image, inner.keep)
        x = samplers.sample(model, x, walk, at, sampler, cond=cond)
        if negative is not None and not heard:
            raise ConfigError(f"a negative prompt changes nothing with guidance {guidance}, which asks for no second prompt")
        x = x if edit is None else editing.paste(x, inner)
        x = x if codec is None else codec.decode(x)
        return x if edit is None else editing.paste(x, edit)

    return sample


def keys(seed, indices):
    """(B,) keys of each sample: of its noise at the start, and of the sampler."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
    return jax.vmap(lambda k: jax.random.split(k), out_axes=1)(keys)


def noise(seed, indices, shape):
    """The z ~ N(0, I) that the samples `indices` (B,) of `seed` begin with, float32 (B, *shape)."""
    return samplers.normal(keys(seed, indices)[0], jax.ShapeDtypeStruct((len(indices), *shape), jnp.float32))


def run(sample, params, cond: dict, count: int, *, seed: int = 0, batch: int = 250, first: int = 0, multiple: int = 1):
    """Generate samples first .. first + count - 1 with a jitted `sample`; the last batch is padded, never smaller (one compilation).

    What `sample` returns may be a tree of arrays, a row each. multiple: the rows of a batch are rounded up to such, as many devices that
    share them ask for.
    """
    batch = -(-min(batch, count) // multiple) * multiple
    out = []
    for start in range(0, count, batch):
        rows = np.arange(start, start + batch)
        part = {k: np.asarray(v)[np.minimum(rows, count - 1)] for k, v in cond.items()}
        out.append(jax.tree.map(np.asarray, sample(params, seed, first + rows, part)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *out)


def classes_of(config, num_classes: int) -> np.ndarray:
    """The classes that a run of this config has seen: those of data.classes, or of any part of a mixture, or all."""
    data = keywords(config["data"])
    parts = [keywords(part).get("classes") for part in data.get("parts", [data])]
    return np.asarray(sorted({c for part in parts for c in part}) if all(parts) else range(num_classes), np.int32)


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., K-1, 0, 1, ...: int32 (count,)."""
    return (np.arange(count) % num_classes).astype(np.int32)
