"""DiffusionNFT: what is good and bad, the gradient where training begins, and whose samples it learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.objectives import nft
from flowjax.predictions import Model
from flowjax.train import ema

RF = paths.rectified()
KEY = jax.random.key(0)


def linear(slope, offset=0.0):
    return Model(lambda x_t, t, cond, key: slope * x_t + offset, RF, "velocity")


def rolled(old=None, n=12, **settings):
    batch = {"x": jnp.zeros((n, 2, 2, 1)), "cond": {"label": jnp.arange(n, dtype=jnp.int32)}}
    nets = {"old": old or linear(0.3), "net": None}  # the network that is trained takes no part
    return jax.jit(lambda batch: nft.rollout(nets, batch, KEY, **{"reward": "ink", "group": 4, "steps": 3} | settings))(batch)


def loss(batch, net, old=None, **settings):
    nets = {"net": net, "old": old or linear(0.3), **settings.pop("nets", {})}
    return jax.jit(lambda batch: nft.loss(nets, batch, None, **settings))(batch)


def test_samples_are_the_old_networks_and_the_good_ones_have_more_ink():
    batch = rolled(sampler="heun", std="group", limit=1.5)
    assert batch["cond"]["label"].tolist() == [0] * 4 + [4] * 4 + [8] * 4
    ink = (np.asarray(batch["x"]).clip(-1, 1).mean(axis=(1, 2, 3)) + 1) / 2
    np.testing.assert_allclose(batch["reward"], ink, rtol=1e-6)
    r = ink.reshape(3, 4)
    normal = (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(batch["good"], (0.5 + 0.5 * (normal / 1.5).clip(-1, 1)).ravel(), rtol=1e-4)
    assert (batch["good"] == 1).any()
    # Linear: Heun's three steps multiply by (1 - h k + h^2 k^2 / 2)^3; what they begin with has unit variance and no twins.
    start = np.asarray(batch["x"]) / (1 - 0.1 + 0.005) ** 3
    assert abs(start.std() - 1) < 0.35 and len(np.unique(start)) == start.size
    by_batch = rolled()
    r = np.asarray(by_batch["reward"]).reshape(3, 4)
    np.testing.assert_allclose(by_batch["good"], (0.5 + 0.1 * (r - r.mean(1, keepdims=True)) / (r.std() + 1e-4)).ravel(), rtol=1e-4)


def test_each_sample_is_noised_several_times():
    batch = rolled(draws=3, time={"name": "uniform", "t_max": 0.5})
    assert batch["t"].shape == (12, 3) and batch["z"].shape == (12, 3, 2, 2, 1)
    assert batch["t"].max() <= 0.5 and len(np.unique(batch["t"])) == 36 and len(np.unique(batch["z"])) == 144
    singles = [loss(batch | {k: batch[k][:, i : i + 1] for k in ("t", "z")}, linear(0.5, 0.1))[0] for i in range(3)]
    assert float(loss(batch, linear(0.5, 0.1))[0]) == pytest.approx(float(np.mean(singles)), rel=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_gradient_where_training_begins(normalise, beta):
    """At net = old: 2 beta (2 r - 1) (y_old - y) dy/dtheta; with the norm, of x and over mean |x_old - x|. Nothing for r = 1/2."""
    batch = rolled(draws=2)
    x, r = (np.repeat(np.asarray(batch[k]), 2, axis=0) for k in ("x", "good"))
    t, z = np.asarray(batch["t"]).reshape(-1, 1, 1, 1), np.asarray(batch["z"]).reshape(24, 2, 2, 1)
    x_t = (1 - t) * x + t * z
    off = 0.3 * x_t - (z - x)  # of the velocity; of x it is -t times that
    scale = t**2 / np.abs(t * off).mean((1, 2, 3), keepdims=True) if normalise else np.ones_like(t)
    expected = (2 * beta * (2 * r - 1).reshape(-1, 1, 1, 1) * off * x_t * scale).mean()
    slope = jax.grad(lambda k, batch: loss(batch, linear(k), beta=beta, normalise=normalise)[0])
    assert float(slope(0.3, batch)) == pytest.approx(expected, rel=1e-3) and abs(expected) > 1e-4
    assert abs(float(slope(0.3, batch | {"good": jnp.full(12, 0.5)}))) < 1e-6


def test_value_of_the_two_sides():
    """One pixel with x = 0, z = 1 at t = 1/2: y = 1; old says 0 and net 0.4, so that with beta = 2 y+ = 0.8 and y- = -0.8."""
    ones = jnp.ones((1, 1, 1, 1))
    batch = {
        "cond": {}, "x": 0 * ones, "z": ones[None], "t": jnp.full((1, 1), 0.5), "good": jnp.asarray([0.7]),
        "reward": jnp.zeros(1), "rewards": {}, "spread": jnp.zeros(1),
    }  # fmt: skip
    value, metrics = loss(batch, linear(0.0, 0.4), linear(0.0), beta=2.0, normalise=False)
    assert float(value) == pytest.approx(0.7 * 0.2**2 + 0.3 * 1.8**2, rel=1e-5)
    assert float(metrics["lag"]) == pytest.approx(0.16, rel=1e-5) and "drift" not in metrics
    # Of x all is half as large, and a square over the absolute value is the absolute value.
    assert float(loss(batch, linear(0.0, 0.4), linear(0.0), beta=2.0)[0]) == pytest.approx(0.7 * 0.1 + 0.3 * 0.9, rel=1e-5)
    near = {"nets": {"reference": linear(0.0, 0.1)}, "anchor": 0.5}
    anchored, metrics = loss(batch, linear(0.0, 0.4), linear(0.0), beta=2.0, normalise=False, **near)
    assert float(metrics["drift"]) == pytest.approx(0.09, rel=1e-4)
    assert float(anchored - value) == pytest.approx(0.5 * 0.09, rel=1e-4)


def test_settings_that_are_not_given():
    batch = {"x": jnp.zeros((16, 2, 2, 1)), "cond": {}}
    said = {"group": 8, "steps": 10, "sampler": "euler", "std": "batch", "limit": 5.0, "draws": 1, "time": "uniform"}
    plain, told = (nft.rollout({"old": linear(0.3)}, batch, KEY, reward="ink", **settings) for settings in ({}, said))
    jax.tree.map(np.testing.assert_array_equal, plain, told)
    assert loss(plain, linear(0.5))[0] == loss(plain, linear(0.5), beta=1.0, normalise=True, anchor=0.0)[0]


def test_only_the_network_learns():
    batch = rolled()

    def value(k):
        return loss(batch, linear(k[0]), linear(k[1]), anchor=0.1, nets={"reference": linear(k[2])})[0]

    assert [bool(g != 0) for g in jax.grad(value)(jnp.asarray([0.5, 0.3, 0.2]))] == [True, False, False]


def test_old_follows_slower_and_slower():
    decay, of = ema.build({"name": "ramp"}, "ema.old")
    assert of == "net" and [float(decay(jnp.float32(n))) for n in (1, 100, 500, 10_000)] == pytest.approx([0.001, 0.1, 0.5, 0.5])
    late, _ = ema.build({"name": "ramp", "decay": 0.999, "slope": 0.0075, "delay": 75}, "ema.old")
    assert [float(late(jnp.float32(n))) for n in (1, 75, 77, 300)] == pytest.approx([0, 0, 0.015, 0.999])


def test_plain_errors():
    for name, value in (("group", 5), ("draws", 0), ("std", "x")):
        with pytest.raises(ConfigError, match=f"objective.{name} = {value!r}"):
            rolled(**{name: value})
    for name, value in (("beta", 0.0), ("anchor", 0.1)):
        with pytest.raises(ConfigError, match=f"objective.{name} = {value!r}"):
            loss(rolled(), linear(0.1), **{name: value})
