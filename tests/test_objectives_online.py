"""Preferences between a network's own samples: who is paired with whom, ties, and the log-ratios of single steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax import paths
from flowjax.config import ConfigError
from flowjax.objectives import groups, grpo, online_dpo, stepwise
from flowjax.predictions import Model

RF = paths.rectified()
KEY = jax.random.key(0)


def linear(slope, offset=0.0):
    return Model(lambda x_t, t, cond, key: slope * x_t + offset, RF, "velocity")


NET, REFERENCE = linear(0.3), linear(0.2, -0.05)


def rolled(objective, n=12, net=NET, **settings):
    batch = {"x": jnp.zeros((n, 2, 2, 1)), "cond": {"label": jnp.arange(n, dtype=jnp.int32)}, "step": jnp.asarray(0)}
    nets = {"net": net, "reference": REFERENCE}
    settings = {"reward": {"ink": 1.0, "symmetry": 0.0}, "steps": 4} | settings
    return jax.jit(lambda batch: objective.rollout(nets, batch, KEY, **settings))(batch)


def loss(objective, batch, net=NET, reference=REFERENCE, **settings):
    fn = objective.OBJECTIVE.players[0].loss
    return jax.jit(lambda batch: fn({"net": net, "reference": reference}, batch, None, **settings))(batch)



def ink(x):
    return (np.asarray(x).clip(-1, 1).mean(axis=(-3, -2, -1)) + 1) / 2


def test_the_best_of_a_group_is_preferred_to_the_worst():
    batch = rolled(online_dpo, group=4)
    assert batch["cond"]["label"].tolist() == [0] * 4 + [4] * 4 + [8] * 4
    reward = np.asarray(batch["reward"]).reshape(3, 4)
    np.testing.assert_allclose(ink(batch["win"]).reshape(3, 4), np.repeat(reward.max(1), 4).reshape(3, 4), rtol=1e-6)
    np.testing.assert_allclose(ink(batch["lose"]).reshape(3, 4), np.repeat(reward.min(1), 4).reshape(3, 4), rtol=1e-6)
    assert len(np.unique(batch["t"])) == 12 and len(np.unique(batch["z"])) == 48 and (batch["weight"] == 1).all()
    value, metrics = loss(online_dpo, batch, REFERENCE)
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)
    assert {"reward", "reward/ink", "reward/symmetry", "diversity", "accuracy", "margin"} <= metrics.keys()
    parts = [loss(online_dpo, jax.tree.map(lambda v: v[i::3], batch))[0] for i in range(3)]
    assert float(loss(online_dpo, batch)[0]) == pytest.approx(float(np.mean(parts)), rel=1e-5)


def test_groups_without_a_difference_count_for_nothing_and_others_the_more():
    best, worst, weight = groups.extremes(jnp.asarray([1.0, 3, 2, 5, 5, 5, 0, -1, 0]), 3)
    assert best.tolist() == [1, 3, 6] and worst.tolist() == [0, 3, 7] and weight.tolist() == [1.5, 0, 1.5]
    assert groups.extremes(jnp.ones(4), 2)[2].tolist() == [0, 0]
    # What is no number is not ranked: the loss is none either, and the train step keeps its state.
    assert np.isnan(groups.extremes(jnp.asarray([1.0, jnp.nan, 2.0, 3.0]), 2)[2]).any()
    batch = rolled(online_dpo, group=4)
    tied = batch | {"weight": jnp.repeat(jnp.asarray([1.5, 0.0, 1.5]), 4)}
    moved = {k: v.at[4:8].add(3.0) if k in ("win", "z") else v for k, v in tied.items()}
    assert float(loss(online_dpo, tied)[0]) == pytest.approx(float(loss(online_dpo, moved)[0]), rel=1e-6)
    assert not np.isfinite(loss(online_dpo, batch | {"weight": jnp.full(12, jnp.nan)})[0])


def test_the_gradient_asks_for_what_is_rewarded():
    """A constant added to the velocity darkens the images: the loss wants less of it where ink is the reward, and more for its opposite."""
    for weight, sign in ((1.0, 1), (-1.0, -1)):
        batch = rolled(online_dpo, n=64, group=8, reward={"ink": weight})
        slope = jax.grad(lambda k: loss(online_dpo, batch, linear(0.3, k), NET)[0])(0.0)
        assert sign * float(slope) > 1e-3
        batch = rolled(stepwise, n=64, reward={"ink": weight})
        slope = jax.grad(lambda k: loss(stepwise, batch, linear(0.3, k), NET)[0])(0.0)
        assert sign * float(slope) > 1e-3


def test_candidates_come_from_one_state_and_are_ranked_by_what_they_promise():
    batch = rolled(stepwise, candidates=3, steps=4)
    assert batch["before"].shape == batch["win"].shape == (12, 3, 2, 2, 1)
    at = np.linspace(1, 0, 5)
    np.testing.assert_allclose(batch["t"], np.tile(at[:3], (12, 1)), atol=1e-6)
    np.testing.assert_allclose(batch["s"], np.tile(at[1:4], (12, 1)), atol=1e-6)
    better, worse = (ink(np.asarray(batch[k]) * (1 - 0.3 * at[1:4].reshape(1, 3, 1, 1, 1))) for k in ("win", "lose"))  # x - s v
    assert (better > worse).all() and (batch["weight"] == 1).all()
    # The policy's own noise, the same law for all steps once it is divided by each one's standard deviation.
    for k in range(3):
        mean, std = grpo.transition(NET.bind({}), batch["before"][:, k], batch["t"][:, k], batch["s"][:, k], 0.7)
        apart = np.asarray((batch["win"] - batch["lose"])[:, k] / std.reshape(-1, 1, 1, 1))
        assert 0.3 < apart.std() < 3
        following = np.asarray(batch["before"])[:, k + 1] if k < 2 else None
        if following is not None:
            assert abs((following - np.asarray(mean)) / np.asarray(std).reshape(-1, 1, 1, 1)).max() < 5


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_ratios_of_steps_by_scipy(reduce):
    batch, over, other = rolled(stepwise), getattr(np, reduce), linear(0.35, 0.02)
    ratio = {}
    for side in ("win", "lose"):
        total = 0
        for sign, net in ((1, other), (-1, REFERENCE)):
            mean, std = zip(*(grpo.transition(net.bind({}), *(batch[name][:, k] for name in ("before", "t", "s")), 0.7) for k in range(3)))
            mean, std = np.stack(mean, 1).astype(np.float64), np.stack(std, 1)[..., None, None, None]
            total = total + sign * over(stats.norm.logpdf(np.asarray(batch[side], np.float64), mean, std), axis=(2, 3, 4))
        ratio[side] = total
    u = 5.0 * (ratio["win"] - ratio["lose"])
    value, metrics = loss(stepwise, batch, other, beta=5.0, reduce=reduce)
    assert float(value) == pytest.approx(np.log1p(np.exp(-u)).mean(), rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(u.mean(), rel=1e-3) and metrics["kl"] > 0
    value, metrics = loss(stepwise, batch, REFERENCE, link="squared")
    assert float(value) == pytest.approx(0.25) and metrics["kl"] == 0


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (online_dpo, {"group": 1}, "objective.group = 1: samples are compared in groups of at least 2"),
        (online_dpo, {"group": 5}, "which divide the 12 rows"),
        (stepwise, {"candidates": 1}, "objective.candidates = 1 should be at least 2"),
        (stepwise, {"steps": 1}, "objective.steps = 1 should be at least 2"),
        (stepwise, {"noise": 0.0}, "objective.noise = 0.0 positive"),
    ],
)
def test_plain_errors(objective, settings, message):
    with pytest.raises(ConfigError, match=message):
        rolled(objective, **settings)


def test_plain_errors_of_the_loss():
    batch = rolled(stepwise)
    with pytest.raises(ConfigError, match="objective.reduce = 'max' is unknown; valid: mean, sum"):
        loss(stepwise, batch, reduce="max")
    with pytest.raises(ConfigError, match="objective.beta = 0.0 should be positive"):
        loss(stepwise, batch, beta=0.0)
