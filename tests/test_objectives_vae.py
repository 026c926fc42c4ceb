"""The VAE loss against the closed form of a linear Gaussian model, with the reductions that give kl_weight its meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax.config import ConfigError
from flowjax.models.vae import kl
from flowjax.objectives import vae

KEY = jax.random.key(0)


class Autoencoder:
    """Latents at half the resolution; mean, logvar and the shift of the reconstruction are constants."""

    def __init__(self, mean=0.0, logvar=0.0, shift=0.0, latent_weight=0.0):
        self.mean, self.logvar, self.shift, self.latent_weight = mean, logvar, shift, latent_weight

    def encode(self, x):
        self.x = x
        shape = (x.shape[0], x.shape[1] // 2, x.shape[2] // 2, 4)
        return jnp.full(shape, self.mean), jnp.full(shape, self.logvar)

    def decode(self, latent):
        up = jnp.repeat(jnp.repeat(latent[..., :3], 2, axis=1), 2, axis=2)
        return self.x + self.shift + self.latent_weight * up


def loss(net, x=None, z=0.0, **settings):
    x = jnp.zeros((5, 8, 8, 3)) if x is None else x
    batch = {"x": x, "z": jnp.full((len(x), 4, 4, 4), z)}
    value, metrics = vae.loss({"net": net}, batch, None, **settings)
    return float(value), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
    ("mean", "logvar", "nats"),
    [(0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, np.log(4.0), 1.5 - np.log(2)), (-2.0, np.log(0.25), 2 - 0.375 + np.log(2))],
)
def test_divergence_is_a_sum_over_latent_dimensions(mean, logvar, nats):
    """KL(N(m, v) || N(0, 1)) = (m^2 + v - 1 - log v) / 2 per dimension, 64 dimensions; 192 pixels and channels divide the loss."""
    value, metrics = loss(Autoencoder(mean, logvar), kl_weight=0.1)
    assert metrics["kl"] == pytest.approx(64 * nats, rel=1e-6)
    assert value == pytest.approx(0.1 * 64 * nats / 192, rel=1e-6)


def test_divergence_agrees_with_a_monte_carlo_estimate():
    m, s = 0.7, 0.6
    z = np.random.RandomState(0).normal(m, s, 400_000)
    estimate = np.mean(stats.norm.logpdf(z, m, s) - stats.norm.logpdf(z))
    assert float(kl(jnp.full((1, 1), m), jnp.full((1, 1), 2 * np.log(s)))[0]) == pytest.approx(estimate, abs=5e-3)


@pytest.mark.parametrize(("reconstruction", "error"), [("l1", 0.2), ("l2", 0.04)])
def test_reconstruction_is_a_mean_over_pixels_and_channels(reconstruction, error):
    value, metrics = loss(Autoencoder(shift=-0.2), reconstruction=reconstruction)
    assert value == pytest.approx(error, rel=1e-5) == metrics["reconstruction"]


def test_kl_weight_is_relative_to_sums_over_an_image():
    """The papers' 1e-6 compares sum_dims |x - x_hat| with sum_latents KL, whatever the sizes."""
    net = Autoencoder(mean=1.0, shift=0.5)  # sums: 96 and 32
    for weight in (1e-6, 3.0):
        value, _ = loss(net, kl_weight=weight)
        assert value * 192 == pytest.approx(192 * 0.5 + weight * 32, rel=1e-6)
    assert loss(Autoencoder(mean=1.0))[0] == pytest.approx(1e-6 * 32 / 192, rel=1e-5)  # the default


def test_latent_is_mean_plus_deviation_times_the_drawn_noise():
    value, _ = loss(Autoencoder(mean=0.25, logvar=2 * np.log(0.5), latent_weight=1.0), z=1.5, kl_weight=0.0)
    assert value == pytest.approx(0.25 + 0.5 * 1.5, rel=1e-6)


def test_gradient_flows_through_the_posteriors_mean_and_deviation():
    def value(mean, logvar):
        net = Autoencoder(mean, logvar, latent_weight=1.0)
        return vae.loss({"net": net}, {"x": jnp.zeros((1, 8, 8, 3)), "z": jnp.full((1, 4, 4, 4), 2.0)}, None, kl_weight=0.0)[0]

    # |m + e^{l / 2} z|: d/dm = 1, d/dl = z e^{l / 2} / 2.
    np.testing.assert_allclose(jax.grad(value, (0, 1))(0.1, np.log(0.25)), [1.0, 0.5], rtol=1e-5)


def test_psnr_is_that_of_a_range_of_two_averaged_over_images():
    _, metrics = loss(Autoencoder(shift=0.2))
    assert metrics["psnr"] == pytest.approx(20 * np.log10(2 / 0.2), rel=1e-5)

    class Uneven(Autoencoder):
        def decode(self, latent):
            return self.x + jnp.asarray([0.2, 0.02])[:, None, None, None]

    _, metrics = loss(Uneven(), jnp.zeros((2, 8, 8, 3)))
    assert metrics["psnr"] == pytest.approx((20 + 40) / 2, rel=1e-4)
    assert loss(Autoencoder())[1]["psnr"] == pytest.approx(10 * np.log10(4e12), rel=1e-5)  # finite for a perfect image


def test_psnr_agrees_with_the_evaluation():
    from flowjax.evals.image import psnr

    x = jax.random.uniform(KEY, (2, 8, 8, 3), minval=-0.5, maxval=0.5)
    _, metrics = loss(Autoencoder(shift=0.1), x)
    assert metrics["psnr"] == pytest.approx(float(np.mean(psnr(x, x + 0.1, data_range=2.0))), rel=1e-4)


def test_rollout_draws_the_posteriors_noise():
    batch = {"x": jnp.zeros((64, 8, 8, 3)), "step": 0}
    out = vae.rollout({"net": Autoencoder()}, batch, KEY)
    assert out["x"] is batch["x"] and out["z"].shape == (64, 4, 4, 4) and out["z"].dtype == jnp.float32
    assert stats.kstest(np.ravel(out["z"]), "norm").pvalue > 1e-3
    assert not np.allclose(out["z"], vae.rollout({"net": Autoencoder()}, batch, jax.random.key(1))["z"])


def test_unknown_reconstruction_is_refused():
    with pytest.raises(ConfigError, match="objective.reconstruction = 'l3' is unknown; valid: l1, l2"):
        loss(Autoencoder(), reconstruction="l3")
