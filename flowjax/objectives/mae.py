"""Masked autoencoding of images (2111.06377, section 3): guess the patches that are hidden from the ones that are seen.

    L = mean over images, hidden patches p and their numbers of |guess_p - (p - mean(p)) / sqrt(var(p) + 1e-6)|^2

with the unbiased variance of the paper's code. A guess of zero costs 1 - 1/n per patch of n numbers that are not all equal.
"""

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.models.dit import patchify
from flowjax.objectives.base import Objective, Player


def rollout(nets, batch, key):
    """Draw an order of the patches for each image: the first ones are seen."""
    images, height, width, _ = batch["x"].shape
    patch = nets["net"].module.patch
    noise = jax.random.uniform(key, (images, (height // patch) * (width // patch)))
    return {**batch, "order": jnp.argsort(noise, axis=1)}


def normalised(patches):
    """Patches (B, N, n) with mean 0 and unbiased variance 1 each; zero where a patch is of one colour."""
    centred = patches - jnp.mean(patches, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.var(patches, axis=-1, keepdims=True, ddof=1) + 1e-6)


def loss(nets, batch, key, *, mask_ratio: float = 0.75):
    """Mean squared error of the hidden patches; as many are seen in every image."""
    del key
    x, order = batch["x"], batch["order"]
    count = order.shape[1]
    seen = int(count * (1 - mask_ratio))
    if not 1 <= seen < count:
        raise ConfigError(f"objective.mask_ratio = {mask_ratio} leaves {seen} of {count} patches to see; valid: 1 to {count - 1}")
    guess = nets["net"](x, order, seen)
    error = jnp.mean(jnp.square(guess - normalised(patchify(x, nets["net"].module.patch))), axis=-1)
    hidden = jnp.argsort(order, axis=1) >= seen
    return jnp.mean(jnp.sum(jnp.where(hidden, error, 0.0), axis=1)) / (count - seen), {}


OBJECTIVE = Objective({"net": "trained"}, (Player("net", loss),), rollout, {"net": "image_encoder"})
