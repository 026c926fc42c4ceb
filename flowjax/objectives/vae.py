"""KL autoencoder of latent diffusion (2112.10752 app. G): reconstruction + a slight pull of the posterior to N(0, I).

    L = mean_batch [ sum_dims |x - x_hat|^p + kl_weight * KL(q(latent | x) || N(0, I)) ],    KL summed over latent dims

Both terms are SUMS over dimensions (the paper's code), so kl_weight has the paper's meaning (1e-6); reported metrics are per
dimension. The posterior's noise is drawn in the rollout. A discriminator joins as a second player (role "discriminator").
"""

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.models.vae import kl
from flowjax.objectives.base import Objective, Player, mean_dims


def rollout(nets, batch, key):
    """Draw the posterior's noise, shaped like the latents of x."""
    shape = jax.eval_shape(lambda x: nets["net"].encode(x)[0], batch["x"])
    return {**batch, "z": jax.random.normal(key, shape.shape, jnp.float32)}


def loss(nets, batch, key, *, reconstruction: str = "l1", kl_weight: float = 1e-6):
    """Sum-reduced VAE loss divided by the dimension of x (a constant that keeps the gradient's scale independent of it)."""
    del key
    powers = {"l1": jnp.abs, "l2": jnp.square}
    if reconstruction not in powers:
        raise ConfigError(f"objective.reconstruction = {reconstruction!r} is unknown; valid: l1, l2")
    net, x = nets["net"], batch["x"]
    mean, logvar = net.encode(x)
    x_hat = net.decode(mean + jnp.exp(0.5 * logvar) * batch["z"])
    dims = x[0].size
    rec = mean_dims(powers[reconstruction](x - x_hat))
    divergence = kl(mean, logvar)
    value = jnp.mean(rec + kl_weight * divergence / dims)
    mse = mean_dims(jnp.square(x - x_hat))
    # x spans [-1, 1], so its range is 2: PSNR = 10 log10(4 / mse), averaged over images.
    psnr = jnp.mean(10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12)))
    return value, {"reconstruction": jnp.mean(rec), "kl": jnp.mean(divergence), "psnr": psnr}


OBJECTIVE = Objective({"net": "trained"}, (Player("net", loss),), rollout)
