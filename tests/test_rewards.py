"""Rewards of hand-made images, their gradients, and what follows from the scores of stored ones."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from flowjax import rewards
from flowjax.config import ConfigError
from flowjax.evals import rewards as evals


def image(rows):
    return np.array(rows, np.uint8)[None, :, :, None]


def score(name, rows):
    """Of images in [-1, 1], given by their brightness (H, W[, C])."""
    rows = jnp.asarray(rows, jnp.float32)
    return float(rewards.score(name, 2 * (rows if rows.ndim == 3 else rows[..., None])[None] - 1)[0][0])


def test_ink_is_mean_brightness():
    assert evals.reward("ink", image([[255, 255], [255, 255]]), None) == [1.0]
    assert evals.reward("ink", image([[255, 0], [0, 0]]), None) == [0.25]
    assert score("ink", [[1, 0], [0.5, 0]]) == pytest.approx(0.375)


def test_upper_is_the_share_above_the_middle():
    assert evals.reward("upper", image([[30, 0], [10, 0]]), None) == [0.75]
    assert evals.reward("upper", image([[0, 0], [0, 0]]), None) == [0.5]
    assert evals.reward("upper", image([[7, 7], [7, 7], [7, 7]]), None) == [0.5]  # the middle row is half above
    # Counted per image, and not a matter of brightness.
    two = np.concatenate([image([[3, 0], [1, 0]]), image([[0, 0], [9, 9]])])
    np.testing.assert_array_equal(evals.reward("upper", two, None), [0.75, 0.0])


def test_symmetry_compares_with_the_mirror_image():
    assert score("symmetry", [[0.2, 0.9, 0.2], [0, 0, 0]]) == pytest.approx(1.0)
    assert score("symmetry", [[1, 0], [1, 0]]) == pytest.approx(0.0)
    assert score("symmetry", [[1, 0.5], [0, 0]]) == pytest.approx(0.75)


def test_colours():
    pixels = jnp.asarray([[[1.0, 0.0, 0.0], [0.6, 0.2, 0.0]]])  # means 0.8, 0.1, 0
    assert [score(k, pixels) for k in ("red", "green", "blue")] == pytest.approx([0.75, -0.3, -0.45])
    with pytest.raises(ConfigError, match="images of 3 channels, and these have 1"):
        score("red", [[1, 0]])


def test_several_are_weighted_and_each_is_told():
    x = jnp.asarray([[[[-1.0], [1.0]], [[-0.5], [0.5]]]])
    total, each = rewards.score({"ink": 2.0, "symmetry": -1.0, "upper": 0.0}, x)
    assert {k: float(v[0]) for k, v in each.items()} == pytest.approx({"ink": 0.5, "symmetry": 0.25, "upper": 0.5})
    assert float(total[0]) == pytest.approx(0.75)


def test_what_is_measured_only_does_nothing_to_what_is_asked_for(monkeypatch):
    """Whatever it is, and whatever its gradient."""
    monkeypatch.setitem(rewards.REWARDS, "odd", lambda images: jnp.sqrt(jnp.min(images, axis=(1, 2, 3))))
    x = -0.5 * jnp.ones((1, 2, 2, 1))
    value, grad = jax.value_and_grad(lambda x: rewards.score({"ink": 1.0, "odd": 0.0}, x)[0][0])(x)
    assert float(value) == 0.25 and np.isfinite(grad).all() and np.isnan(rewards.score({"ink": 1.0, "odd": 0.0}, x)[1]["odd"]).all()


def test_overshoot_earns_nothing():
    x = jnp.asarray([[[[3.0], [-7.0]]]])
    value, grad = jax.value_and_grad(lambda x: rewards.score("ink", x)[0][0])(x)
    assert float(value) == 0.5 and not grad.any()


@pytest.mark.parametrize("name", sorted({*rewards.REWARDS} - {*rewards.JUDGES}))
def test_gradients_are_those_of_differences(name):
    with jax.enable_x64(True):
        x, way = jax.random.uniform(jax.random.key(1), (2, 2, 4, 6, 3), minval=-0.9, maxval=0.9)
        fn = jax.jit(lambda h: jnp.sum(rewards.score(name, x + h * way)[0] * jnp.asarray([1.0, 2.0])))
        assert float(jax.grad(fn)(0.0)) == pytest.approx(float(fn(1e-6) - fn(-1e-6)) / 2e-6, rel=1e-6)
    empty = jax.jit(jax.grad(lambda x: rewards.score(name, x)[0].sum()))(-jnp.ones((1, 2, 2, 3)))
    assert np.isfinite(empty).all()


class Judge:
    """Logits that are the first pixels; tells what time it was asked at."""

    def __init__(self, time):
        self.module, self.asked = types.SimpleNamespace(time=time, kind="classifier"), []

    def __call__(self, x, t):
        self.asked.append(t)
        return x[:, 0, :, 0]


@pytest.mark.parametrize("time", [True, False])
def test_agreement_is_the_judges_log_probability_of_the_asked_class(time):
    x, judge = jax.random.uniform(jax.random.key(0), (4, 2, 3, 1), minval=-1), Judge(time)
    total, _ = rewards.score("agreement", x, jnp.asarray([0, 2, 1, 3]), judge)
    np.testing.assert_allclose(total[:3], log_softmax(x[:3, 0, :, 0], axis=1)[np.arange(3), [0, 2, 1]], rtol=1e-6)
    assert np.isnan(total[3])  # a class that it does not know stops the run, at the guard of the step
    both, each = rewards.score({"ink": 0.0, "agreement": 1.0}, x[:3], jnp.asarray([0, 2, 1]), Judge(time))
    np.testing.assert_array_equal(both, total[:3])
    np.testing.assert_allclose(each["ink"], (x[:3].mean((1, 2, 3)) + 1) / 2, rtol=1e-6)
    assert (judge.asked[0] is None) != time and (not time or not judge.asked[0].any())


def test_plain_errors():
    x = jnp.zeros((2, 2, 2, 1))
    for section, message in [
        ({"ink": 0.0}, "asks for nothing"), ({}, "asks for nothing"),
        ({"ink": "much"}, "objective.reward.ink = 'much' should be a number"),
        ({"beauty": 1}, "objective.reward = 'beauty' is unknown; valid: agreement, blue"), (3, "objective.reward = 3 should be a name"),
        ("agreement", "'agreement' asks a classifier: roles.reward.checkpoint"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            rewards.score(section, x)
    with pytest.raises(ConfigError, match="roles.reward takes no part"):
        rewards.score("ink", x, None, Judge(False))
    with pytest.raises(ConfigError, match="the data has no labels"):
        rewards.score("agreement", x, None, Judge(False))
    with pytest.raises(ConfigError, match=r"rewards look at images .* have the shape \(2, 3\)"):
        rewards.score("ink", jnp.zeros((2, 3)))
    with pytest.raises(ConfigError, match="ink"):
        evals.reward("beauty", image([[0]]), None)


def test_a_reward_of_the_wrong_shape_is_refused(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "per pixel", lambda images: images.mean(axis=(2, 3)))
    with pytest.raises(ConfigError, match=r"'per pixel' gave shape \(2, 4\) for 2 images; it should be \(2,\)"):
        rewards.score("per pixel", jnp.zeros((2, 4, 4, 1)))


def test_a_reward_that_is_not_a_number_is_refused(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "odd", lambda images: jnp.where(images[:, 0, 0, 0] > 0, jnp.nan, 1.0))
    with pytest.raises(ConfigError, match="reward 'odd' is not a number for 1 of 3 images"):
        evals.reward("odd", np.concatenate([image([[0]]), image([[255]]), image([[0]])]), None)


def test_rankings_are_best_first_and_ties_are_left_out():
    x = np.arange(9).reshape(3, 3)
    ranked, kept = evals.ranked(x, np.array([[0.1, 0.5, 0.3], [1.0, 1.0, 2.0], [3.0, 2.0, 1.0]]))
    np.testing.assert_array_equal(ranked, [[1, 2, 0], [6, 7, 8]])
    np.testing.assert_array_equal(kept, [True, False, True])


def test_win_rate_counts_ties_half_and_is_antisymmetric():
    a, b = [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]
    assert evals.win_rate(a, b) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert evals.win_rate(a, b) + evals.win_rate(b, a) == 1.0


def test_pairs_are_best_against_worst_and_ties_are_left_out():
    x = np.arange(6).reshape(2, 3)
    win, lose, kept = evals.best_and_worst(x, np.array([[0.1, 0.5, 0.3], [1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(win, [1])
    np.testing.assert_array_equal(lose, [0])
    np.testing.assert_array_equal(kept, [True, False])
