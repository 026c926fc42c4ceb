"""The exact network of four Gaussians against flowjax.exact, and through an export like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import exact, paths
from flowjax.config import ConfigError
from flowjax.models.mixture import Mixture

T = jnp.asarray([0.03, 0.3, 0.6, 0.99])


def points():
    x, z = np.random.default_rng(0).normal(size=(2, 4, 2))
    return paths.rectified().perturb(jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32), T)


@pytest.mark.parametrize("path", ["rectified", "trigonometric"])
@pytest.mark.parametrize("prediction", ["velocity", "x", "eps"])
def test_it_is_the_posterior_mean(path, prediction):
    net = Mixture(path=path, prediction=prediction, num_classes=4)
    label = jnp.asarray([0, 3, 4, 4])
    given = points(), T, {"label": label}
    found = net.apply(net.init(jax.random.key(0), *given), *given)
    with jax.enable_x64(True):
        wanted = exact.mix4().predict(paths.PATHS[path](), prediction, *(jnp.asarray(v, "float64") for v in given[:2]), label)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_its_parameters_are_the_mixture():
    """Moved and stretched Gaussians of other weights."""
    weights, means, stds = np.array([0.1, 0.2, 0.3, 0.4]), np.array([(0.0, 0), (1, 0), (0, 2), (2, 2)]), np.array([0.1, 0.2, 0.3, 0.4])
    params = {"weights": jnp.asarray(weights), "means": jnp.asarray(means), "stds": jnp.asarray(stds)}
    found = Mixture().apply({"params": params}, points(), T, {})
    wanted = exact.mixture(weights, means, stds).velocity(paths.rectified(), points(), T)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_null_is_the_whole_mixture_and_classes_are_components():
    net = Mixture(num_classes=4)
    assert net.null({"label": jnp.asarray([1, 2])})["label"].tolist() == [4, 4] and not Mixture().has_null
    with pytest.raises(ConfigError, match="should be 0 or 4"):
        Mixture(num_classes=3).init(jax.random.key(0), points(), T, {"label": jnp.zeros(4, int)})
