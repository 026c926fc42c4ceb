"""Editing: what is kept stays, what SDEdit begins with has the law of x_t0, a kept part is seen as training shows it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import editing, generate, paths, predictions, samplers, times
from flowjax.config import ConfigError

IMAGE = jax.random.normal(jax.random.key(0), (4, 4, 2))
KEEP = jnp.zeros((4, 4, 1)).at[:2].set(1.0)


class Exact:
    """A role whose network is the exact one of N(mean, std^2) in every pixel."""

    class module:
        kind = "denoiser"

    def __init__(self, path, prediction, mean=0.5, std=0.7):
        self.path, self.prediction, self.mean, self.std = path, prediction, mean, std

    def net(self, params):
        def apply(x_t, t, cond, key):
            x, z = self.posterior(x_t, t)
            return predictions.target(self.path, self.prediction, x, z, t)

        return predictions.Model(apply, self.path, self.prediction, None)

    def posterior(self, x_t, t):
        """E[x | x_t] and E[z | x_t], from the joint Gaussian."""
        a, b = (paths.expand(f(t), x_t) for f in (self.path.a, self.path.b))
        gain = a * self.std**2 / (a**2 * self.std**2 + b**2)
        x = self.mean + gain * (x_t - a * self.mean)
        return x, b / (a**2 * self.std**2 + b**2) * (x_t - a * self.mean)


def draw(role, edit, count=2, **settings):
    sample = generate.make(role, (4, 4, 2), edit=edit, **{"steps": 8, **settings})
    return np.asarray(sample(None, 0, jnp.arange(count), {}))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ancestral", {"name": "churn", "churn": 2.0}])
@pytest.mark.parametrize(("path", "prediction"), [("rectified", "velocity"), ("rectified", "x"), ("vp_linear", "eps")])
def test_what_is_kept_stays_and_the_rest_is_drawn(path, prediction, sampler):
    role = Exact(paths.PATHS[path](), prediction)
    x = draw(role, editing.Edit(IMAGE, KEEP), sampler=sampler)
    np.testing.assert_array_equal(x[:, :2], np.broadcast_to(IMAGE[:2], (2, 2, 4, 2)))
    assert np.isfinite(x).all() and np.abs(x[0, 2:] - x[1, 2:]).min() > 0
    # Pixels are independent here, so the others do not notice.
    if sampler in ("euler", "heun"):
        free = generate.make(role, (4, 4, 2), steps=8, sampler=sampler)(None, 0, jnp.arange(2), {})
        np.testing.assert_allclose(x[:, 2:], np.asarray(free)[:, 2:], atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "x", "eps"])
def test_the_network_sees_the_kept_part_as_training_shows_it(prediction):
    """At every step it is a(t) x + b(t) z with one noise, whatever the solver's order."""
    path = paths.rectified()
    role = Exact(path, prediction)
    model = editing.keeping(role.net(None), IMAGE, KEEP)
    z = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    at = times.grid(6, path, t_start=0.9)
    start = path.perturb(jnp.broadcast_to(IMAGE, z.shape), z, at[0])
    for sampler in ("euler", "rk4"):
        _, way = samplers.sample(model, start, jax.random.key(2), at, sampler, return_trajectory=True)
        for t, x_t in zip(at[:-1], way[:-1]):
            np.testing.assert_allclose(x_t[:, :2], path.perturb(jnp.broadcast_to(IMAGE, z.shape), z, t)[:, :2], atol=2e-5)


@pytest.mark.parametrize("name", ["rectified", "trigonometric", "vp_linear"])
def test_sdedit_starts_at_x_t0(name):
    """Of a point mass the flow from t0 on ends at the point; of a Gaussian, where the exact flow map takes x_t0."""
    path, strength = paths.PATHS[name](), 0.4
    edit = editing.Edit(IMAGE, strength=strength)
    role = Exact(path, "velocity", mean=0.3, std=0.6)
    x = draw(role, edit, count=64, steps=200, sampler="rk4")
    # The flow of a Gaussian is affine: (x_t - a m) / sqrt(a^2 s^2 + b^2) stays. E over noise: x_t0 = a x + b z.
    a, b = float(path.a(strength)), float(path.b(strength))
    ratio = 0.6 / np.sqrt(a**2 * 0.36 + b**2)
    expected = 0.3 + ratio * a * (np.asarray(IMAGE) - 0.3)
    spread = ratio * b
    assert np.abs((x.mean(0) - expected) / (spread / 8)).max() < 4.5
    np.testing.assert_allclose(x.std(0).mean(), spread, rtol=0.1)


def test_a_latent_is_kept_where_all_of_its_pixels_are():
    class Codec:
        encode = staticmethod(lambda x: x.reshape(1, 2, 2, 2, 2, 2).mean((2, 4)))

    keep = jnp.ones((4, 4, 1)).at[0, 0].set(0.0)
    inner = editing.encoded(editing.Edit(IMAGE, keep), Codec)
    assert inner.image.shape == (2, 2, 2) and inner.keep[..., 0].tolist() == [[0, 1], [1, 1]]


def test_edits_that_make_no_sense_are_refused():
    role = Exact(paths.rectified(), "velocity")
    for edit, message in (
        (editing.Edit(IMAGE), "strength = 1 without a mask"),
        (editing.Edit(IMAGE, strength=0.0), "strength = 0.0"),
        (editing.Edit(IMAGE, strength=1.5), "strength = 1.5"),
        (editing.Edit(IMAGE[:2], KEEP), "the image to edit has shape"),
        (editing.Edit(IMAGE, KEEP[:2]), "the mask has shape"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate.make(role, (4, 4, 2), edit=edit)
    with pytest.raises(ConfigError, match="t_start = 0.5 already"):
        generate.make(role, (4, 4, 2), edit=editing.Edit(IMAGE, strength=0.3), grid={"name": "uniform", "t_start": 0.5})
