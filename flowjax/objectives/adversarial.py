"""What objectives with a discriminator share: the losses of both sides, and the two kinds of discriminator.

    hinge          L_fool = -mean D(made)             L_D = mean relu(1 - D(data)) + mean relu(1 + D(made))
    nonsaturating  L_fool = mean softplus(-D(made))   L_D = mean softplus(-D(data)) + mean softplus(D(made))

A discriminator judges clean images, by their pixels (model patch_gan) or by a frozen image encoder's tokens (model feature_head, role
"encoder", 2311.17042), or noisy ones together with their time and condition: a denoiser with a projector (model.projector, features =
1), whose projection is the logits of a grid of patches. The latter may begin as a teacher, whose features are then what it judges
by (2405.14867, 2403.12015), and keep all but the projector as it is (optimizer.rules = [{"match": "^(?!projector)", "rate": 0.0}]).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowjax import times
from flowjax.config import ConfigError, keywords, lookup
from flowjax.objectives import repa
from flowjax.objectives.base import same_meaning
from flowjax.predictions import Model


class Adversary(NamedTuple):
    """Losses by logits: `fool` of who made the images, `data` and `made` of the discriminator."""

    fool: Callable
    data: Callable
    made: Callable


ADVERSARIES = {
    "hinge": Adversary(lambda made: -made, lambda data: jax.nn.relu(1.0 - data), lambda made: jax.nn.relu(1.0 + made)),
    "nonsaturating": Adversary(lambda made: jax.nn.softplus(-made), lambda data: jax.nn.softplus(-data), jax.nn.softplus),
}


def adversary(name: str) -> Adversary:
    """The entry that objective.adversarial names."""
    return lookup(ADVERSARIES, name, "objective.adversarial")


def logits(nets, x, z, t, cond, key=None):
    """What the role "discriminator" says of x (B, ...): of x itself, of its features, or of a x + b z at t on the path of "net"."""
    net, judge = nets["net"], nets["discriminator"]
    if not isinstance(judge, Model):
        if getattr(getattr(judge, "module", None), "kind", "discriminator") != "discriminator":
            raise ConfigError(
                f"roles.discriminator is a network of kind {judge.module.kind!r}; valid: discriminator, or a denoiser with model.projector"
            )
        if "encoder" in nets:
            x = repa.features(nets["encoder"], nets["vae"].decode(x) if "vae" in nets else x)
        return judge(x)
    if "encoder" in nets:
        raise ConfigError("roles.encoder is for a discriminator of its tokens (model feature_head), and roles.discriminator is a denoiser")
    if judge.project is None:
        raise ConfigError("roles.discriminator is a denoiser without a projector: set roles.discriminator.model.projector, with features = 1")
    same_meaning(judge, net, "roles.discriminator", ("path",))
    return judge.project(net.path.perturb(x, z, t), t, cond, key)[1]


def judging(adversarial: str, of_data, of_made):
    """(L_D, metrics) of the logits of data and of images made."""
    losses = adversary(adversarial)
    value = jnp.mean(losses.data(of_data)) + jnp.mean(losses.made(of_made))
    return value, {"data": jnp.mean(of_data), "made": jnp.mean(of_made)}


# For generators `net` of x from batch["x_in"] at batch["tau"], judged by a role "discriminator" against batch["x"].


def noises(nets, x, key, gan_time):
    """What a discriminator of noisy images sees them with: times of the law gan_time (None: uniform), noises of made and of data."""
    net = nets["net"]
    if gan_time is not None and not isinstance(nets["discriminator"], Model):
        raise ConfigError(f"objective.gan_time = {gan_time!r} is when a discriminator of noisy images looks, and roles.discriminator sees clean ones")
    key_t, key_made, key_data = jax.random.split(key, 3)
    return {
        "gan_t": times.draw(key_t, len(x), net.path, prediction=net.prediction, **keywords(gan_time or "uniform")),
        "gan_z": jax.random.normal(key_made, x.shape, x.dtype),
        "gan_z_data": jax.random.normal(key_data, x.shape, x.dtype),
    }


def fooling(nets, batch, x, adversarial: str):
    """L_fool of the images x."""
    of_made = logits(nets, x, batch["gan_z"], batch["gan_t"], batch["cond"])
    return jnp.mean(adversary(adversarial).fool(of_made))


def discriminating(nets, batch, key, adversarial: str):
    """(L_D, metrics) of the data and of what the generator makes now."""
    t, cond = batch["gan_t"], batch["cond"]
    made = jax.lax.stop_gradient(nets["net"].get("x", batch["x_in"], batch["tau"], cond))
    pairs = (batch["x"], batch["gan_z_data"]), (made, batch["gan_z"])
    return judging(adversarial, *(logits(nets, x, z, t, cond, key) for x, z in pairs))
