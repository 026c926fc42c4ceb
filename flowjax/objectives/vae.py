"""Autoencoders of latent diffusion (2112.10752 app. G): reconstruction + a slight pull of the posterior to N(0, I), and a
discriminator against blur (2012.09841, eq. 5 to 7).

    L = mean_batch [ sum_dims (|x - x_hat|^p + w_p d(x, x_hat)) + kl_weight KL(q(latent | x) || N(0, I)) ] + lambda L_adv

All terms but the last are SUMS over dimensions (the papers' code), so kl_weight has the papers' meaning (1e-6); the loss is divided
by the dimension of x, a constant, and reported metrics are per dimension. d is a perceptual distance (role "perceptual", optional;
flowjax.models.perceptual). The posterior's noise is drawn in the rollout.

`vae` has L_adv = 0. `vae_gan` plays against a PatchGAN D (role "discriminator"), both updated in each step, from step `start` on:

    hinge          L_adv = -mean D(x_hat)             L_D = (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2
    nonsaturating  L_adv = mean softplus(-D(x_hat))   L_D = (mean softplus(-D(x)) + mean softplus(D(x_hat))) / 2
    lambda = adversarial_weight clip(|dL_rec/dW| / (|dL_adv/dW| + 1e-4), 0, max_weight)       W: kernel of the decoder's last layer

with L_rec the sums above. Gradients in the ratio are those of the whole batch (Player.measure): accumulation does not change lambda.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import traverse_util

from flowjax.config import ConfigError, lookup
from flowjax.models.vae import kl
from flowjax.objectives.adversarial import adversary, judging
from flowjax.objectives.base import Objective, Player, mean_dims, perceptual_error

RECONSTRUCTIONS = {"l1": jnp.abs, "l2": jnp.square}


def rollout(nets, batch, key):
    """Draw the posterior's noise, shaped like the latents of x."""
    shape = jax.eval_shape(lambda x: nets["net"].encode(x)[0], batch["x"])
    return {**batch, "z": jax.random.normal(key, shape.shape, jnp.float32)}


def encoded(net, batch, sample: bool):
    """(latent, mean, logvar) of batch["x"]: the latent is a sample of the posterior, or its mean."""
    mean, logvar = net.encode(batch["x"])
    return mean + jnp.exp(0.5 * logvar) * batch["z"] if sample else mean, mean, logvar


def errors(nets, x, x_hat, reconstruction: str, perceptual_weight: float):
    """(sum over dimensions of the reconstruction error / dimensions (B,), metrics)."""
    rec = mean_dims(lookup(RECONSTRUCTIONS, reconstruction, "objective.reconstruction")(x - x_hat))
    metrics = {"reconstruction": jnp.mean(rec)}
    seen, said = perceptual_error(nets, perceptual_weight, x, x_hat)
    return rec + seen, metrics | said


def loss(nets, batch, key, *, reconstruction: str = "l1", kl_weight: float = 1e-6, perceptual_weight: float = 0.0, sample: bool = True):
    """Sum-reduced loss divided by the dimension of x (a constant that keeps the gradient's scale independent of it).

    sample: decode a sample of the posterior; without it, which takes kl_weight = 0, this is a plain autoencoder.
    """
    return _with_image(nets, batch, reconstruction, kl_weight, perceptual_weight, sample)[:2]


def _with_image(nets, batch, reconstruction, kl_weight, perceptual_weight, sample):
    """(loss, metrics, x_hat)."""
    if kl_weight and not sample:
        raise ConfigError(f"objective.kl_weight = {kl_weight} needs objective.sample = True: a plain autoencoder has no posterior")
    x = batch["x"]
    latent, mean, logvar = encoded(nets["net"], batch, sample)
    x_hat = nets["net"].decode(latent)
    rec, metrics = errors(nets, x, x_hat, reconstruction, perceptual_weight)
    divergence = kl(mean, logvar)
    value = jnp.mean(rec + kl_weight * divergence / x[0].size)
    mse = mean_dims(jnp.square(x - x_hat))
    # x spans [-1, 1], so its range is 2: PSNR = 10 log10(4 / mse), averaged over images.
    psnr = jnp.mean(10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12)))
    return value, {**metrics, "kl": jnp.mean(divergence), "psnr": psnr}, x_hat


def last_layer(net):
    """(kernel of the decoder's last layer, the function that puts another in its place and returns the net)."""
    leaves = traverse_util.flatten_dict(net.params)
    path = net.module.last_layer
    return leaves[path], lambda kernel: dataclasses.replace(net, params=traverse_util.unflatten_dict({**leaves, path: kernel}))


def last_gradients(nets, batch, key, *, reconstruction: str = "l1", perceptual_weight: float = 0.0, sample: bool = True,
                   adversarial: str = "hinge", adaptive: bool = True):
    """What `adaptive` compares: gradients of the mean reconstruction error and of L_adv by the decoder's last kernel."""
    del key
    if not adaptive:
        return {}
    kernel, placed = last_layer(nets["net"])
    latent = encoded(nets["net"], batch, sample)[0]
    x_hat, by_kernel = jax.vjp(lambda kernel: placed(kernel).decode(latent), kernel)
    fool = adversary(adversarial).fool
    terms = {
        "reconstruction": lambda x_hat: jnp.mean(errors(nets, batch["x"], x_hat, reconstruction, perceptual_weight)[0]),
        "adversarial": lambda x_hat: jnp.mean(fool(nets["discriminator"](x_hat))),
    }
    return {name: by_kernel(jax.grad(term)(x_hat))[0] for name, term in terms.items()}


def generator_loss(nets, batch, key, *, reconstruction: str = "l1", kl_weight: float = 1e-6, perceptual_weight: float = 0.0,
                   sample: bool = True, adversarial: str = "hinge", adversarial_weight: float = 0.5, adaptive: bool = True,
                   max_weight: float = 1e4, start: int = 50_001):
    """The autoencoder's loss, divided by the dimension of x as `loss` is; without `adaptive`, lambda is adversarial_weight.

    max_weight bounds the ratio of the papers, whose reconstruction is a sum: the ratio per dimension times the dimension of x.
    """
    del key
    value, metrics, x_hat = _with_image(nets, batch, reconstruction, kl_weight, perceptual_weight, sample)
    fooling = jnp.mean(adversary(adversarial).fool(nets["discriminator"](x_hat)))
    weight = adversarial_weight
    if adaptive:
        rec, adv = (jnp.sqrt(jnp.sum(jnp.square(batch["measured"][k]))) for k in ("reconstruction", "adversarial"))
        weight = weight * jnp.clip(batch["x"][0].size * rec / (adv + 1e-4), 0.0, max_weight)
    weight = jnp.where(batch["step"] >= start, weight, 0.0)
    return value + weight * fooling / batch["x"][0].size, {**metrics, "adversarial": fooling, "adversarial_weight": weight}


def discriminator_loss(nets, batch, key, *, sample: bool = True, adversarial: str = "hinge", start: int = 50_001):
    """L_D with the images of the autoencoder that was just updated; nothing before step `start`, so D stays where it began."""
    del key
    x_hat = jax.lax.stop_gradient(nets["net"].decode(encoded(nets["net"], batch, sample)[0]))
    # Two calls: networks with statistics of the batch would otherwise see both kinds in one.
    real, fake = (nets["discriminator"](v) for v in (batch["x"], x_hat))
    value = 0.5 * judging(adversarial, real, fake)[0]
    return jnp.where(batch["step"] >= start, value, 0.0), {"real": jnp.mean(real), "fake": jnp.mean(fake)}


OBJECTIVE = Objective({"net": "trained", "perceptual": "optional"}, (Player("net", loss),), rollout, {"net": "autoencoder"})
GAN = Objective(
    {"net": "trained", "discriminator": "trained", "perceptual": "optional"},
    (Player("net", generator_loss, measure=last_gradients), Player("discriminator", discriminator_loss)),
    rollout,
    {"net": "autoencoder", "discriminator": "discriminator"},
)
