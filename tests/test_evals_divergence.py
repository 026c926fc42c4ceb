"""The divergence of trajectories against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import exact, paths
from flowjax.evals.divergence import path_kl
from flowjax.predictions import Model
from flowjax.times import grid

RF = paths.rectified()
KEY = jax.random.key(0)


def linear(slope, offset=0.0):
    return Model(lambda x_t, t, cond, key: slope * x_t + offset, RF, "velocity").bind({})


def weights(at, a):
    """KL of one step over |v - v_ref|^2: (dt / 2) (s (1 - t) / (2 t) + 1 / s)^2 with s = a sqrt(t / (1 - t)) (2505.05470, eq. of section 4.2);
    of the first, whose s takes 1 - t from the step's end, dt^2 / (2 a^2)."""
    t, dt = at[:-2], at[:-2] - at[1:-1]
    s = a * np.sqrt(t[1:] / (1 - t[1:]))
    return np.concatenate([dt[:1] ** 2 / (2 * a**2), dt[1:] / 2 * (s * (1 - t[1:]) / (2 * t[1:]) + 1 / s) ** 2])


def test_a_constant_velocity_apart():
    """Whatever the trajectories: the sum over steps, and over 6 dimensions."""
    at, begin = grid(8, RF), jax.random.normal(KEY, (5, 3, 2))
    for a in (0.4, 0.7):
        found = path_kl(linear(0.3, 0.2), linear(0.3, -0.1), begin, KEY, at, a)
        np.testing.assert_allclose(found, 6 * 0.3**2 * weights(at, a).sum() * np.ones(5), rtol=1e-4)
    assert path_kl(linear(0.3), linear(0.3), begin, KEY, at).max() < 1e-9


def test_trajectories_are_the_first_networks():
    """Zero velocity against k x: the variance of its states is a recursion of linear Gaussian steps."""
    at, a, k = grid(6, RF), 0.7, 0.5
    found = path_kl(linear(0.0), linear(k), jax.random.normal(KEY, (40_000, 1)), jax.random.key(1), at, a)
    variance, total = 1.0, 0.0
    for t, s, w in zip(at[:-2], at[1:-1], weights(at, a)):
        total += w * k**2 * variance
        sigma2 = a**2 * t / (1 - (t if t < 1 else s))
        variance = (1 - sigma2 * (t - s) / (2 * t)) ** 2 * variance + sigma2 * (t - s)
    assert float(found.mean()) == pytest.approx(total, rel=0.02)


def test_rows_have_noises_of_their_own():
    """With keys for each row, a row says the same in any batch."""
    keys, begin = jax.random.split(KEY, 6), jnp.ones((6, 2))
    whole = path_kl(linear(0.1), linear(0.5), begin, keys, grid(5, RF))
    assert len(np.unique(whole)) == 6
    np.testing.assert_allclose(path_kl(linear(0.1), linear(0.5), begin[2:4], keys[2:4], grid(5, RF)), whole[2:4], rtol=1e-6)


def test_what_differs_in_the_last_step_alone_is_not_seen():
    """It has no noise. So this divergence bounds that of the states before it, and not that of the samples."""
    at = grid(8, RF)
    late = lambda before: Model(lambda x_t, t, cond, key: 0.3 * x_t + jnp.where(t < before, 9.0, 0.0)[:, None], RF, "velocity").bind({})  # noqa: E731
    begin = jax.random.normal(KEY, (5, 2))
    assert path_kl(late(at[-3]), linear(0.3), begin, KEY, at).max() < 1e-9 < path_kl(late(at[-4]), linear(0.3), begin, KEY, at).min()


@pytest.mark.parametrize("path", ["vp_linear", "edm"])
def test_it_bounds_the_divergence_of_what_is_sampled(path):
    """Exact velocities of N(0, 1) and N(1/2, 1): samples are 1/8 nats apart, their trajectories no less, and of one network not at all."""
    path = paths.PATHS[path]()
    one, other = (exact.gaussian([m], 1.0).model(path).bind({}) for m in (0.5, 0.0))
    at = grid(100, path)
    begin = path.b(jnp.float32(at[0])) * jax.random.normal(KEY, (4000, 1))
    found = float(path_kl(one, other, begin, jax.random.key(1), at).mean())
    a, b = (float(v(jnp.float32(at[-2]))) for v in (path.a, path.b))  # where the last noise leads to
    assert 0.97 * a**2 / (a**2 + b**2) / 8 < found < 3
    assert float(path_kl(one, one, begin, KEY, at).mean()) < 1e-9
