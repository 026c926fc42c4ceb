"""Samples that begin with an image, or keep a part of one: SDEdit (2108.01073) and inpainting, for any path and sampler.

    SDEdit       start at t0 = strength from x_t0 = a(t0) x + b(t0) z instead of at the noise
    inpainting   where the mask says "keep" the network's guess of the image is replaced by the image itself

With the guess x_hat = x the flow of a kept pixel is a(t) x + b(t) z with its own noise z held fixed: at every time what the
network was trained to see there, and x at the end. (2201.09865 draws fresh noise at every step instead; like there, what is
made is drawn to fit what is kept by the network alone, not by exact conditioning.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.paths import expand
from flowjax.predictions import Model, target


class Edit(NamedTuple):
    """image (H, W, C) in [-1, 1]; keep (H, W, 1) of 0 and 1, or None to keep nothing; strength in (0, 1], the time to start at."""

    image: jax.Array
    keep: jax.Array | None = None
    strength: float = 1.0


def check(edit: Edit, shape, path) -> Edit:
    """The edit, or a ConfigError where it does not fit images of `shape` (H, W, C)."""
    if tuple(edit.image.shape) != tuple(shape):
        raise ConfigError(f"the image to edit has shape {tuple(edit.image.shape)}, the network makes {tuple(shape)}")
    if edit.keep is not None and tuple(edit.keep.shape) != (*shape[:2], 1):
        raise ConfigError(f"the mask has shape {tuple(edit.keep.shape)}, the image {tuple(shape)}")
    if not path.t_min < edit.strength <= 1:
        raise ConfigError(f"strength = {edit.strength} should be above {path.t_min} and at most 1")
    if edit.keep is None and edit.strength == 1:
        raise ConfigError("strength = 1 without a mask forgets the image; give a smaller strength, or a mask")
    return edit


def encoded(edit: Edit, codec) -> Edit:
    """The same for latents: the image encoded, and a latent kept where all of its pixels are."""
    image = codec.encode(edit.image[None])[0]
    if edit.keep is None:
        return edit._replace(image=image)
    rows, columns = image.shape[:2]
    blocks = edit.keep.reshape(rows, edit.keep.shape[0] // rows, columns, edit.keep.shape[1] // columns)
    return edit._replace(image=image, keep=jnp.min(blocks, axis=(1, 3))[..., None])


def keeping(model: Model, image, keep) -> Model:
    """`model` with its guess of the clean data replaced by `image` where `keep` is 1; both broadcast against x_t (B, H, W, C)."""

    def apply(x_t, t, cond, key):
        y = model.apply(x_t, t, cond, key)
        # Where b = 0 the noise is not to be seen any more. What the floor makes of it there only bends the last step of solvers
        # that look at their end, after which `paste` has the last word.
        a, b = (expand(f(t), x_t) for f in (model.path.a, model.path.b))
        z = (x_t - a * image) / jnp.maximum(b, 1e-6)
        return jnp.where(keep > 0, target(model.path, model.prediction, jnp.broadcast_to(image, x_t.shape), z, t), y)

    if model.memory is not None:
        raise ConfigError("a mask does not go with guidance that remembers (apg with momentum)")
    return model.replace(apply=apply)


def paste(x, edit: Edit):
    """x (B, H, W, C) with the kept part of the image in its place."""
    return x if edit.keep is None else jnp.where(edit.keep > 0, edit.image, x)
