"""Flow matching against the exact posterior of a mixture, and what its rollout draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import quadrature
from flowjax import exact, objectives, predictions, weights
from flowjax.config import ConfigError
from flowjax.objectives import flow_matching
from flowjax.objectives.base import drop_condition, mean_dims
from flowjax.paths import PATHS, rectified
from flowjax.predictions import PREDICTIONS, Model
from flowjax.times import draw, interval
from flowjax.weights import WEIGHTS

RF = rectified()
LINE = exact.mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])
KEY = jax.random.key(0)
SIGMAS = (0.7, 2.0)  # noise levels b/a at which every path is looked at
# Every path with every prediction; the weights take turns, so that each meets several of both.
COMBINATIONS = [
    (path, prediction, sorted(WEIGHTS)[(i * 5 + j) % len(WEIGHTS)])
    for i, path in enumerate(PATHS)
    for j, prediction in enumerate(PREDICTIONS)
]


def perturbed(model, theta):
    """The model plus theta_0 + theta_1 x_t / (a + b)."""

    def apply(x_t, t, cond, key):
        scale = (model.path.a(t) + model.path.b(t))[:, None]
        return model.apply(x_t, t, cond, key) + theta[0] + theta[1] * x_t / scale

    return model.replace(apply=apply)


def test_every_weight_takes_part():
    assert {w for _, _, w in COMBINATIONS} == set(WEIGHTS)


@pytest.mark.parametrize(("path", "prediction", "weight"), COMBINATIONS)
def test_loss_is_least_at_the_exact_prediction_and_equals_the_posterior_variance_there(path, prediction, weight):
    with jax.enable_x64(True):
        path = PATHS[path]()
        x, z, node_weights = quadrature.mixture_and_noise(LINE, 24)
        t = [float(path.time_of_sigma(jnp.asarray(s))) for s in SIGMAS]
        batch = {"x": jnp.tile(x, (2, 1)), "z": jnp.tile(z, (2, 1)), "t": jnp.repeat(jnp.asarray(t), len(x)), "cond": {}}
        model = LINE.model(path, prediction)

        def loss(theta):
            nets = {"net": perturbed(model, theta)}
            rule = jnp.tile(node_weights, 2) / 2
            return quadrature.expected(lambda b: flow_matching.loss(nets, b, None, weight=weight), batch, rule)

        value, gradient = jax.value_and_grad(loss)(jnp.zeros(2))
        away, back = jax.value_and_grad(loss)(jnp.asarray([0.1, -0.1]))

        # E ||y - E[y | x_t]||^2 = gain^2 Var[x | x_t]
        variance = LINE.x_cov(path, path.perturb(batch["x"], batch["z"], batch["t"]), batch["t"])[:, 0, 0]
        per_time = variance.reshape(2, -1) @ node_weights
        factor = [predictions.gain(path, prediction, s) ** 2 * weights.loss_weight(weight, path, prediction, s) for s in t]
        assert float(value) == pytest.approx(float(per_time @ jnp.asarray(factor)) / 2, rel=1e-6)
        assert np.abs(gradient).max() < 1e-5 * np.abs(back).max()
        # Quadratic about its minimum.
        assert float(away - value) == pytest.approx(float(back @ jnp.asarray([0.1, -0.1])) / 2, rel=1e-4)
        assert away > value * (1 + 1e-9)


@pytest.mark.parametrize(("std", "dim"), [(1.0, 3), (0.5, 2)])
def test_irreducible_loss_of_rectified_flow_is_half_pi_times_the_standard_deviation(std, dim):
    """int_0^1 s^2 / ((1 - t)^2 s^2 + t^2) dt = s pi / 2 per dimension."""
    data = exact.gaussian(np.full(dim, 0.3), std**2)
    bound = objectives.build({"name": "flow_matching", "time": {"name": "uniform", "stratified": True}})
    nets = {"net": data.model(RF)}
    batch = bound.rollout(nets, {"x": data.sample(KEY, 40_000), "cond": {}}, jax.random.key(1))
    loss, metrics = bound.players[0].loss(nets, batch, None)
    assert float(loss) == pytest.approx(std * np.pi / 2, rel=0.02)
    assert float(metrics["mse"]) == pytest.approx(float(loss), rel=1e-6)


def test_weight_multiplies_each_example_and_the_metric_stays_unweighted():
    batch = {"x": jnp.ones((2, 3)), "z": jnp.full((2, 3), 3.0), "t": jnp.asarray([0.5, 0.25]), "cond": {}}
    net = Model(lambda x_t, t, cond, key: jnp.zeros_like(x_t), RF, "velocity")
    # The velocity is z - x = 2, so that each example's error is 4; SNR+1 on it is t^2 (SNR + 1) = (1 - t)^2 + t^2: 0.5 and 0.625.
    value, metrics = flow_matching.loss({"net": net}, batch, None, weight="snr_plus_one")
    assert float(value) == pytest.approx(4 * (0.5 + 0.625) / 2, rel=1e-6)
    assert float(metrics["mse"]) == pytest.approx(4.0, rel=1e-6)


def test_network_sees_the_interpolation_its_time_condition_and_dropout_key():
    seen = {}

    def apply(x_t, t, cond, key):
        seen.update(x_t=x_t, t=t, cond=cond, key=key)
        return x_t

    batch = {"x": jnp.full((1, 2), 2.0), "z": jnp.full((1, 2), -1.0), "t": jnp.asarray([0.25]), "cond": {"label": jnp.asarray([3])}}
    flow_matching.loss({"net": Model(apply, RF, "velocity")}, batch, KEY)
    np.testing.assert_allclose(seen["x_t"], 0.75 * 2.0 - 0.25)
    assert seen["t"] == 0.25 and seen["cond"]["label"] == 3 and seen["key"] is KEY


LABELLED = Model(
    lambda x_t, t, cond, key: x_t, RF, "velocity", null=lambda cond: {**cond, "label": jnp.full_like(cond["label"], 10)}
)


def rollout(n=4096, net=LABELLED, key=KEY, **settings):
    cond = {"label": jnp.arange(n) % 10, "caption": jnp.arange(2 * n).reshape(n, 2)} if net.null else {}
    batch = {"x": jnp.zeros((n, 3)), "cond": cond, "step": jnp.asarray(7)}
    return batch, flow_matching.rollout({"net": net}, batch, key, **settings)


def test_rollout_keeps_the_batch_and_draws_noise_of_its_shape():
    batch, out = rollout()
    assert out["x"] is batch["x"] and out["step"] is batch["step"] and out["cond"] is batch["cond"]
    assert out["z"].shape == (4096, 3) and out["z"].dtype == jnp.float32 and out["t"].shape == (4096,)
    assert stats.kstest(np.ravel(out["z"]), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(out["t"], out["z"][:, 0])[0, 1]) < 0.06
    other = rollout(key=jax.random.key(1))[1]
    assert not np.allclose(out["z"], other["z"]) and not np.allclose(out["t"], other["t"])


@pytest.mark.parametrize("time", ["uniform", "cosmap", {"name": "logit_normal", "mean": -0.5, "std": 0.8, "shift": 2.0}])
def test_rollout_follows_the_time_law(time):
    t = np.asarray(rollout(time=time)[1]["t"])
    settings = {"name": time} if isinstance(time, str) else time
    reference = draw(jax.random.key(9), 20_000, RF, **settings)
    assert stats.ks_2samp(t, reference).pvalue > 1e-3


def test_rollout_can_stratify():
    t = np.sort(rollout(256, time={"name": "uniform", "stratified": True})[1]["t"])
    assert np.array_equal(np.floor(t * 256 - t[0] * 256 + 1e-3), np.arange(256))


def test_rollout_stays_where_the_prediction_is_determined():
    low, high = interval(RF, "eps")
    t = rollout(20_000, net=LABELLED.replace(prediction="eps"))[1]["t"]
    assert high < 1 and low <= t.min() and 0.99 * high < t.max() <= high
    low, high = interval(RF, "x")
    t = rollout(20_000, net=LABELLED.replace(prediction="x"))[1]["t"]
    assert low > 0 and low <= t.min() < 2 * low


def test_labels_are_dropped_per_example_at_the_asked_rate_and_nothing_else_is():
    batch, out = rollout(label_drop=0.2)
    dropped = np.asarray(out["cond"]["label"]) == 10
    assert stats.binomtest(int(dropped.sum()), 4096, 0.2).pvalue > 1e-3
    np.testing.assert_array_equal(out["cond"]["label"][~dropped], batch["cond"]["label"][~dropped])
    np.testing.assert_array_equal(out["cond"]["caption"], batch["cond"]["caption"])
    # Independent of the class and of the time.
    assert stats.chisquare(np.bincount(np.asarray(batch["cond"]["label"])[dropped], minlength=10)).pvalue > 1e-3
    assert stats.ks_2samp(np.asarray(out["t"])[dropped], np.asarray(out["t"])[~dropped]).pvalue > 1e-3


def test_a_whole_condition_is_dropped_at_once():
    net = LABELLED.replace(null=lambda cond: {"label": jnp.full_like(cond["label"], 10), "caption": -jnp.ones_like(cond["caption"])})
    cond = rollout(1000, net=net, label_drop=0.5)[1]["cond"]
    dropped = np.asarray(cond["label"]) == 10
    assert 0 < dropped.sum() < 1000
    np.testing.assert_array_equal((np.asarray(cond["caption"]) == -1).all(axis=1), dropped)
    np.testing.assert_array_equal((np.asarray(cond["caption"]) == -1).any(axis=1), dropped)


def test_dropping_every_label_drops_every_label():
    assert (rollout(64, label_drop=1.0)[1]["cond"]["label"] == 10).all()


def test_label_drop_needs_something_to_drop_to():
    net = LABELLED.replace(null=None)
    for cond in ({"label": jnp.zeros(2, int)}, {}):  # a setting without effect is an error, not a silence
        with pytest.raises(ValueError, match="label_drop > 0 needs a network with a null condition"):
            drop_condition(net, cond, KEY, 0.1)
    assert drop_condition(net, {"label": 1}, KEY, 0.0) == {"label": 1}


def test_mean_dims_reduces_all_but_the_batch_in_float32():
    x = jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)
    out = mean_dims(x)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [5.5, 17.5])
    # 4096 summands of 1/4096 + 1 would stop growing in bfloat16.
    assert mean_dims(jnp.full((1, 4096), 1.0078125, jnp.bfloat16))[0] == 1.0078125


class Features:
    """Features whose distance is the squared difference of the first channel's mean times nine."""

    def feature_maps(self, x):
        return (3.0 * jnp.mean(x[..., :1], axis=(1, 2), keepdims=True),)


def test_perceptual_distance_is_that_of_the_image_of_the_pair():
    """From z = 0 at t = 1 a velocity of -1/5 makes 1/5, where the pair has 0: squares 0.04 of the velocity, and 9 * 0.04 of the features."""
    net = Model(lambda x, t, c, k: x - 0.2, RF, "velocity")
    x = jnp.zeros((2, 4, 4, 3))
    batch, nets = {"x": x, "z": x, "t": jnp.ones(2), "cond": {}}, {"net": net, "perceptual": Features()}
    for settings, wanted in (({}, 0.04 + 0.5 * 0.36), ({"squares": 0.0}, 0.5 * 0.36)):
        loss = objectives.build({"name": "flow_matching", "perceptual_weight": 0.5, **settings}).players[0].loss
        value, metrics = loss(nets, batch, None)
        np.testing.assert_allclose([value, metrics["mse"], metrics["perceptual"]], [wanted, 0.04, 0.36], rtol=1e-5)
    for settings, has in (({"perceptual_weight": 0.5}, {"net": net}), ({}, nets)):
        with pytest.raises(ConfigError, match="objective.perceptual_weight = .* and roles.perceptual go together: both or neither"):
            objectives.build({"name": "flow_matching", **settings}).players[0].loss(has, batch, None)
    with pytest.raises(ConfigError, match="no feature maps; valid: lpips, classifier"):
        loss({"net": net, "perceptual": net}, batch, None)
    with pytest.raises(ConfigError, match="objective.squares = 0.0 weighs the regression beside objective.perceptual_weight"):
        objectives.build({"name": "flow_matching", "squares": 0.0}).players[0].loss({"net": net}, batch, None)
    rollout = objectives.build("flow_matching").rollout
    with pytest.raises(ConfigError, match="roles.perceptual compares .* the data should be couplings"):
        rollout(nets, {"x": x, "cond": {}}, KEY)
    assert "z" in rollout(nets, {"x": x, "z": x, "cond": {}}, KEY)
