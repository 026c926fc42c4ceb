"""Log-likelihood against closed-form densities, and the variances of its trace estimators."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import exact
from flowjax.config import ConfigError
from flowjax.paths import PATHS, rectified, trigonometric
from flowjax.predictions import Model
from flowjax.samplers.likelihood import bits_per_dim, exact_divergence, hutchinson_divergence, log_likelihood

pytestmark = pytest.mark.usefixtures("float64")

RF = rectified()
KEY = jax.random.key(0)
TIMES = np.linspace(0.0, 1.0, 101)


@pytest.mark.parametrize("path", ["rectified", "trigonometric"])
def test_gaussian(path):
    """N(.7, .25) at 1.1: -.5457914, of which the integral of the divergence is ln 2."""
    path = PATHS[path]()
    data, x = exact.gaussian([0.7], 0.25), jnp.asarray([[1.1]])
    log_p, z = log_likelihood(data.model(path), x, KEY, TIMES, "exact")
    assert float(log_p[0]) == pytest.approx(-0.5457914, abs=1e-6)
    assert float(z[0, 0]) == pytest.approx(0.8, abs=1e-6)
    log_prior = -0.5 * 0.8**2 - 0.5 * math.log(2 * math.pi)
    assert float(log_p[0]) - log_prior == pytest.approx(math.log(2), abs=1e-6)


def test_prior_has_the_scale_of_the_path():
    """b(1) = 3: also there the density of x does not depend on the path."""
    data, path = exact.gaussian([0.7, -0.2], 0.25), trigonometric(3.0)
    x = jnp.asarray([[1.1, 0.3], [0.2, -0.2]])
    log_p, _ = log_likelihood(data.model(path), x, KEY, TIMES, "exact")
    np.testing.assert_allclose(log_p, data.log_prob(RF, x, 0.0), atol=1e-5)


def test_mixture_in_two_dimensions():
    data = exact.mix4(0.4)
    x = data.sample(KEY, 6, jnp.float64)
    log_p, _ = log_likelihood(data.model(RF), x, KEY, np.linspace(0, 1, 201), "exact")
    np.testing.assert_allclose(log_p, data.log_prob(RF, x, 0.0), atol=1e-6)


def test_hutchinson_is_exact_for_a_diagonal_jacobian():
    data = exact.gaussian([0.7, 0.1], [0.25, 2.0])
    x = jnp.asarray([[1.1, 0.3], [0.2, -0.2]])
    log_p, _ = log_likelihood(data.model(RF), x, KEY, TIMES)
    np.testing.assert_allclose(log_p, data.log_prob(RF, x, 0.0), atol=1e-6)
    noisy, _ = log_likelihood(data.model(RF), x, KEY, TIMES, probe="gaussian")
    assert not np.allclose(noisy, log_p, atol=1e-3)


def test_images_and_conditions():
    data = exact.gaussian([0.7, 0.1, -0.3, 0.0], [0.25, 2.0, 1.0, 0.5])
    shifted = data.model(RF)
    model = shifted.replace(apply=lambda x_t, t, cond, key: shifted.apply(x_t, t, None, key) * cond["on"].reshape(-1, 1, 1, 1))
    x = jax.random.normal(KEY, (3, 2, 2, 1))
    log_p, _ = log_likelihood(model, x, KEY, TIMES, "exact", cond={"on": jnp.asarray([1.0, 1.0, 0.0])})
    np.testing.assert_allclose(log_p[:2], data.log_prob(RF, x, 0.0)[:2], atol=1e-6)
    np.testing.assert_allclose(log_p[2], -0.5 * jnp.sum(x[2] ** 2) - 2 * math.log(2 * math.pi), atol=1e-9)


def linear(x):
    return x @ jnp.asarray([[1.0, 2.0], [0.0, -1.0]]).T


@pytest.mark.parametrize(("probe", "variance"), [("rademacher", 4.0), ("gaussian", 8.0)])
def test_variance_of_hutchinson(probe, variance):
    """J = [[1, 2], [0, -1]] has trace 0. One probe per trajectory: a constant J must not be averaged over the steps."""
    model = Model(lambda x_t, t, cond, key: linear(x_t), RF, "velocity")
    x = jnp.zeros((40000, 2))
    log_p, _ = log_likelihood(model, x, KEY, np.linspace(0, 1, 5), probe=probe)
    integral = log_p + math.log(2 * math.pi)
    assert float(integral.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(integral.var()) == pytest.approx(variance, rel=0.05)
    if probe == "rademacher":
        np.testing.assert_allclose(abs(integral), 2.0, atol=1e-9)


def test_divergences():
    x = jax.random.normal(KEY, (5, 2))
    field = lambda x: jnp.stack([x[:, 0] ** 2 * x[:, 1], jnp.sin(x[:, 1]) + x[:, 0]], axis=1)
    truth = 2 * x[:, 0] * x[:, 1] + jnp.cos(x[:, 1])
    np.testing.assert_allclose(exact_divergence(field, x, None), truth, atol=1e-12)
    probe = jnp.asarray([[1.0, -2.0]] * 5)
    np.testing.assert_allclose(hutchinson_divergence(linear, x, probe), 1 * 1 - 2 * 2 - 4, atol=1e-12)


def test_probes_belong_to_their_rows():
    model = Model(lambda x_t, t, cond, key: linear(x_t), RF, "velocity")
    keys = jax.random.split(KEY, 6)
    run = lambda keys: log_likelihood(model, jnp.zeros((len(keys), 2)), keys, [0.0, 1.0])[0]
    np.testing.assert_allclose(run(keys[2:4]), run(keys)[2:4], atol=1e-12)
    assert len(np.unique(np.round(run(keys), 6))) == 2


def test_bits_per_dim():
    """Uniform data has 8 bits per dimension, whatever the interval that the 256 values are mapped to."""
    assert float(bits_per_dim(-12 * math.log(2.0), 12)) == pytest.approx(8.0)
    assert float(bits_per_dim(0.0, 12, width=1.0)) == pytest.approx(8.0)
    assert float(bits_per_dim(0.0, 12, levels=32, width=1.0)) == pytest.approx(5.0)
    assert float(bits_per_dim(math.log(2.0), 1, width=1.0)) == pytest.approx(7.0)


def test_bad_settings():
    model = exact.gaussian([0.7], 0.25).model(RF)
    with pytest.raises(ConfigError, match="hutchinson"):
        log_likelihood(model, jnp.ones((1, 1)), KEY, TIMES, "trace")
    with pytest.raises(ConfigError, match="rademacher"):
        log_likelihood(model, jnp.ones((1, 1)), KEY, TIMES, probe="uniform")
