"""Cross-entropy in closed form, and the noisy, shifted images that the rollout makes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax.config import ConfigError
from flowjax.objectives import classification

KEY = jax.random.key(0)


class Net:
    """Constant logits; remembers what it was called with."""

    def __init__(self, logits=(0.0, 0.0), time=False):
        self.logits, self.module = jnp.asarray(logits), types.SimpleNamespace(time=time)

    def __call__(self, x, t=None, **options):
        self.seen = {"t": t, **options}
        return jnp.broadcast_to(self.logits, (len(x), len(self.logits)))


def loss(net, labels, key=None, t=None, **settings):
    batch = {"x": jnp.zeros((len(labels), 2)), "cond": {"label": jnp.asarray(labels)}, **({} if t is None else {"t": t})}
    return classification.loss({"net": net}, batch, key, **settings)


def test_equal_logits_give_log_of_the_number_of_classes():
    for smoothing in (0.0, 0.3):
        value, metrics = loss(Net(np.zeros(7)), [0, 3, 6], smoothing=smoothing)
        assert float(value) == pytest.approx(np.log(7), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3)


def test_loss_is_minus_the_log_probability_of_the_label():
    """Logits log(1, 2, 5): probabilities 1/8, 2/8, 5/8; smoothing 0.3 spreads 0.1 over each class."""
    net = Net(np.log([1.0, 2.0, 5.0]))
    value, metrics = loss(net, [2, 0])
    assert float(value) == pytest.approx((np.log(8) + np.log(8 / 5)) / 2, rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5
    assert [float(loss(net, [k])[1]["accuracy"]) for k in range(3)] == [0, 0, 1]
    value, _ = loss(net, [2], smoothing=0.3)
    assert float(value) == pytest.approx(0.8 * np.log(8 / 5) + 0.1 * np.log(4) + 0.1 * np.log(8), rel=1e-6)


def test_key_switches_dropout_on_and_time_is_passed():
    net = Net()
    loss(net, [0], t=jnp.asarray([0.3]))
    assert net.seen == {"t": 0.3}
    loss(net, [0], key=KEY)
    assert net.seen == {"t": None, "train": True, "rngs": {"dropout": KEY}}


def rollout(net, x, **settings):
    return classification.rollout({"net": net}, {"x": x, "cond": {}, "step": 0}, KEY, **settings)


def test_a_network_without_time_sees_clean_images():
    x = jax.random.normal(KEY, (4, 8, 8, 1))
    out = rollout(Net(), x)
    assert out["x"] is x and "t" not in out


def test_a_network_with_time_sees_noisy_images_of_its_path():
    """x = 3 everywhere: x_t has mean 3 a and deviation b in each image."""
    out = rollout(Net(time=True), jnp.full((64, 32, 32, 1), 3.0), path={"name": "trigonometric"})
    t = np.asarray(out["t"])
    assert stats.kstest(t, "uniform").pvalue > 1e-3
    np.testing.assert_allclose(out["x"].mean((1, 2, 3)), 3 * np.cos(np.pi / 2 * t), atol=0.13)
    np.testing.assert_allclose(out["x"].std((1, 2, 3)), np.sin(np.pi / 2 * t), atol=0.1)
    plain = rollout(Net(time=True), jnp.full((64, 32, 32, 1), 3.0), time={"name": "logit_normal", "mean": 2.0})
    np.testing.assert_allclose(plain["x"].mean((1, 2, 3)), 3 * (1 - np.asarray(plain["t"])), atol=0.13)
    assert np.median(plain["t"]) > 0.8


def test_shift_moves_the_batch_by_up_to_so_many_pixels_each_way():
    x = jnp.zeros((2, 9, 9, 1)).at[:, 4, 4].set(1.0)
    places = set()
    for seed in range(60):
        out = classification.rollout({"net": Net()}, {"x": x}, jax.random.key(seed), shift=1)["x"]
        (i, j), (k, m) = (tuple(np.argwhere(image[..., 0])[0]) for image in np.asarray(out))
        assert (i, j) == (k, m)
        places.add((int(i), int(j)))
    assert places == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}


def test_unknown_path_is_refused():
    with pytest.raises(ConfigError, match="objective.path"):
        rollout(Net(time=True), jnp.zeros((2, 4, 4, 1)), path="straight")
