"""ReFL and DRaFT-K: gradients of a linear model in closed form, of the whole sampler by differences, and what holds them back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import paths, samplers
from flowjax.config import ConfigError
from flowjax.objectives import flow_matching
from flowjax.objectives import reward_feedback as rf
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")

RF = paths.rectified()
KEY = jax.random.key(0)
LABELS = jnp.arange(32, dtype=jnp.int32) % 4
STEPS = 8


def linear(slope):
    """v = slope x_t: an Euler step from t to s multiplies by 1 - (t - s) slope, and x_hat = (1 - t slope) x_t."""
    return Model(lambda x_t, t, cond, key: slope * x_t, RF, "velocity")


def curved(theta):
    """Not linear, and different for each class."""

    def apply(x_t, t, cond, key):
        label = (cond["label"] / 4).reshape(-1, 1, 1, 1)
        return jnp.sin(theta * x_t) + theta**2 * label * t.reshape(-1, 1, 1, 1)

    return Model(apply, RF, "velocity")


def rolled(net, n=32, **settings):
    batch = {"x": 0.3 * jax.random.normal(jax.random.key(7), (n, 2, 2, 1)), "cond": {"label": LABELS[:n]}}
    return jax.jit(lambda batch: rf.rollout({"net": net}, batch, KEY, **{"steps": STEPS, "late": 3} | settings))(batch)


def loss(batch, net, **settings):
    nets = {"net": net, **settings.pop("nets", {})}
    return jax.jit(lambda batch: rf.loss(nets, batch, KEY, **{"reward": "ink"} | settings))(batch)


@pytest.mark.parametrize(("through", "late"), [(1, 1), (1, 5), (3, 1), (2, 3)])
def test_gradient_of_a_linear_model(through, late):
    """Ink of x_hat = x_in prod_j (1 - h_j theta), h_j the lengths of what follows x_in: its derivative in theta by hand."""
    theta = 0.4
    batch = rolled(linear(theta), through=through, late=late)
    batch["x_in"] = 0.2 * batch["x_in"]  # inside [-1, 1], where no pixel is clipped
    at = np.asarray(batch["at"])
    lengths = at - np.append(at[:, 1:], np.zeros((32, 1)), axis=1)
    factors = 1 - lengths * theta
    slope = (-lengths / factors).sum(1) * factors.prod(1)
    x = np.asarray(batch["x_in"]).mean(axis=(1, 2, 3))
    value, grad = jax.value_and_grad(lambda theta: loss(batch, linear(theta), strength=3.0)[0])(theta)
    assert float(value) == pytest.approx(-3 * (0.5 + 0.5 * (factors.prod(1) * x).mean()), rel=1e-6)
    assert float(grad) == pytest.approx(-3 * 0.5 * (slope * x).mean(), rel=1e-5) and abs(grad) > 1e-3


@pytest.mark.parametrize(("through", "late"), [(1, 1), (1, 5), (3, 1), (2, 3), (STEPS, 1)])
def test_gradients_begin_at_a_state_of_the_sampler(through, late):
    theta, last = 0.4, STEPS - through
    start = rolled(linear(theta), through=STEPS, late=1)["x_in"]
    batch = rolled(linear(theta), through=through, late=late)
    index = np.rint((1 - np.asarray(batch["at"])) * STEPS).astype(int)
    np.testing.assert_allclose(batch["at"], 1 - index / STEPS, atol=1e-6)
    assert {*index[:, 0].tolist()} == {*range(last - late + 1, last + 1)} and (np.diff(index, axis=1) == 1).all()
    np.testing.assert_allclose(batch["x_in"], start * (1 - theta / STEPS) ** index[:, 0].reshape(-1, 1, 1, 1), rtol=1e-5)
    assert abs(float(start.std()) - 1) < 0.2 and len(np.unique(start)) == start.size


def test_through_all_steps_it_is_the_gradient_of_the_sampler():
    theta = 0.6
    batch = rolled(curved(theta), through=STEPS, late=1)
    batch["x_in"] = batch["x_in"].astype(jnp.float64)

    def reward(theta):
        made = samplers.sample(curved(theta), batch["x_in"], KEY, jnp.linspace(1, 0, STEPS + 1), "euler", batch["cond"])
        return jnp.mean((jnp.clip(made, -1, 1) + 1) / 2)

    at, below, above = jax.jit(jax.vmap(reward))(theta + jnp.asarray([0, -1e-5, 1e-5]))
    value, grad = jax.value_and_grad(lambda theta: -loss(batch, curved(theta))[0])(theta)
    assert float(value) == pytest.approx(float(at), rel=1e-6)
    assert float(grad) == pytest.approx(float(above - below) / 2e-5, rel=1e-4)


def test_margin_is_where_the_reward_is_enough():
    batch = rolled(linear(0.4))
    plain, told = loss(batch, linear(0.4))
    assert plain == -told["reward"] and float(loss(batch, linear(0.4), margin=2.0)[0]) == pytest.approx(2 + float(plain), rel=1e-6)
    value, grad = jax.value_and_grad(lambda theta: loss(batch, linear(theta), margin=0.0)[0])(0.4)
    assert value == 0 == grad


def test_pretraining_is_flow_matching_on_the_data():
    batch = rolled(curved(0.4), pretrain=0.5, time={"name": "uniform", "t_max": 0.5})
    assert batch["t"].max() <= 0.5
    plain, _ = loss(batch, curved(0.6))
    on_data, told = flow_matching.loss({"net": curved(0.6)}, batch, None, weight="x")
    value, metrics = loss(batch, curved(0.6), pretrain=0.5, weight="x")
    assert float(value) == pytest.approx(float(plain + 0.5 * on_data), rel=1e-6) and metrics["mse"] == told["mse"]


def test_anchor_is_the_distance_from_the_references_velocity():
    batch = rolled(linear(0.4), through=2, late=1)
    plain, _ = loss(batch, linear(0.6))
    value, metrics = loss(batch, linear(0.6), nets={"reference": linear(0.1)}, anchor=0.3)
    distance = 0.25 * float(jnp.mean(batch["x_in"] ** 2))
    assert float(metrics["drift"]) == pytest.approx(distance, rel=1e-6)
    assert float(value) == pytest.approx(float(plain) + 0.3 * distance, rel=1e-6)
    of_reference = jax.grad(lambda theta: loss(batch, linear(0.6), nets={"reference": linear(theta)}, anchor=0.3)[0])(0.1)
    assert of_reference == 0


def test_rewards_look_at_what_is_decoded():
    """A frozen autoencoder, of which gradients reach the latents."""

    class Codec:
        def decode(self, latent):
            return jnp.repeat(0.1 * latent, 3, axis=3)

    batch = rolled(linear(0.4))
    told = loss(batch, linear(0.4), nets={"vae": Codec()}, reward={"ink": 1.0, "red": 2.0})[1]
    x_hat = np.asarray(batch["x_in"]) * (1 - 0.4 * np.asarray(batch["at"]).reshape(-1, 1, 1, 1))
    told = {k: float(v) for k, v in told.items()}
    assert told == pytest.approx({"reward/ink": (0.1 * x_hat.mean() + 1) / 2, "reward/red": 0.0, "reward": told["reward/ink"]}, abs=1e-6)
    assert jax.grad(lambda theta: loss(batch, linear(theta), nets={"vae": Codec()})[0])(0.4) != 0


def test_plain_errors():
    batch = rolled(linear(0.4))
    for settings in ({"through": 0}, {"late": 0}, {"through": 5, "late": 5}):
        with pytest.raises(ConfigError, match="objective.through = .* and through . late - 1 at most steps = 8"):
            rolled(linear(0.4), **settings)
    with pytest.raises(ConfigError, match="objective.anchor = 1.0: above 0 it needs roles.reference"):
        loss(batch, linear(0.4), anchor=1.0)
    with pytest.raises(ConfigError, match="objective.anchor = 0.0: .* takes no part otherwise"):
        loss(batch, linear(0.4), nets={"reference": linear(0.4)})
    with pytest.raises(ConfigError, match="objective.strength = 0.0 should be positive"):
        loss(batch, linear(0.4), strength=0.0)
    with pytest.raises(ConfigError, match="roles.reference was trained with another path"):
        loss(batch, linear(0.4), nets={"reference": linear(0.4).replace(path=paths.vp_linear())}, anchor=1.0)
