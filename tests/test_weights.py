import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import paths, predictions, times
from flowjax.config import ConfigError
from flowjax.paths import PATHS
from flowjax.predictions import PREDICTIONS
from flowjax.weights import WEIGHTS, loss_weight

pytestmark = pytest.mark.usefixtures("float64")

T = np.array([0.02, 0.25, 0.5, 0.8, 0.97])


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]()


# The table of the papers: weights on ||x_hat - x||^2 as functions of SNR = q, of sigma, and of lambda and -lambda'.
W_X = {
    "x": lambda q, path: np.ones_like(q),
    "snr": lambda q, path: q,
    "snr_plus_one": lambda q, path: q + 1,
    "truncated_snr": lambda q, path: np.maximum(q, 1),
    "min_snr": lambda q, path: np.minimum(q, 5),
    "edm": lambda q, path: (1 / q + 0.25) / (0.25 / q),
    "sigmoid": lambda q, path: 1 / (1 + np.exp(-np.log(q))) * -path.dlog_snr(T),
    "velocity": lambda q, path: (path.wronskian(T) / path.b(T)) ** 2,
}


def test_every_weight_is_tested():
    assert set(W_X) | {"none"} == set(WEIGHTS)


@pytest.mark.parametrize("name", W_X)
def test_weights_on_x(path, name):
    np.testing.assert_allclose(loss_weight(name, path, "x", T), W_X[name](np.asarray(path.snr(T)), path), rtol=1e-9)


@pytest.mark.parametrize("section", [*W_X, {"name": "min_snr", "gamma": 2.0}, {"name": "sigmoid", "bias": -1.5}])
def test_losses_agree_sample_by_sample(path, section):
    # One network output, converted to every kind: the weighted squared errors are the same numbers.
    x, z, error = jax.random.normal(jax.random.key(0), (3, len(T), 7), jnp.float64)
    t = jnp.asarray(T)
    x_t, losses = path.perturb(x, z, t), {}
    for name in PREDICTIONS:
        y = predictions.target(path, name, x, z, t)
        y_hat = predictions.convert(path, "x", name, x + error, x_t, t)
        losses[name] = loss_weight(section, path, name, t) * jnp.sum((y_hat - y) ** 2, axis=1)
    for name in PREDICTIONS:
        np.testing.assert_allclose(losses[name], losses["x"], rtol=1e-9)


def test_weights_at_a_quarter():
    # RF, t = .25: SNR 9; min-SNR-5 is 5 on x, 5/9 on eps, 5/16 on the velocity.
    values = {p: float(loss_weight("min_snr", paths.rectified(), p, 0.25)) for p in ("x", "eps", "velocity")}
    np.testing.assert_allclose(list(values.values()), [5, 5 / 9, 0.3125], rtol=1e-12)


def test_min_snr_of_the_three_parametrisations():
    # 2303.09556 on a variance-preserving path: min(q, g), min(q, g) / q and min(q, g) / (q + 1).
    path = paths.vp_cosine()
    q = np.asarray(path.snr(T))
    for name, want in (("x", 1), ("eps", 1 / q), ("v", 1 / (q + 1))):
        np.testing.assert_allclose(loss_weight("min_snr", path, name, T), np.minimum(q, 5) * want, rtol=1e-10)


def test_each_weight_is_one_on_its_own_prediction(path):
    ones = np.ones_like(T)
    np.testing.assert_allclose(loss_weight("snr", path, "eps", T), ones, rtol=1e-12)
    np.testing.assert_allclose(loss_weight("velocity", path, "velocity", T), ones, rtol=1e-10)
    np.testing.assert_allclose(loss_weight("edm", path, "edm", T), ones, rtol=1e-10)
    for prediction in PREDICTIONS:
        np.testing.assert_array_equal(loss_weight("none", path, prediction, T), ones)
    if path.name in ("vp_linear", "vp_cosine", "trigonometric"):
        np.testing.assert_allclose(loss_weight("snr_plus_one", path, "v", T), ones, rtol=1e-9)


def test_velocity_weight_of_jit():
    """1 / max(t, 0.05)^2 on x for the straight path, hence t^2 / max(t, 0.05)^2 on the velocity; in units of the noise elsewhere."""
    t, section = np.array([0.01, 0.05, 0.1, 0.9]), {"name": "velocity", "floor": 0.05}
    np.testing.assert_allclose(loss_weight(section, paths.rectified(), "x", t), [400, 400, 100, 1 / 0.81], rtol=1e-9)
    np.testing.assert_allclose(loss_weight(section, paths.rectified(), "velocity", t), [0.04, 1, 1, 1], rtol=1e-9)
    edm = paths.edm()
    np.testing.assert_allclose(loss_weight({"name": "velocity", "floor": 8.0}, edm, "x", t), np.array([100, 100, 100, 1 / 0.81]), rtol=1e-9)


def test_edm_weight_at_sigma_data():
    path = paths.edm()
    t = path.time_of_sigma(0.5)
    np.testing.assert_allclose(loss_weight("edm", path, "x", t), 8.0, rtol=1e-12)
    np.testing.assert_allclose(loss_weight({"name": "edm", "sigma_data": 1.0}, path, "x", t), 5.0, rtol=1e-12)


def test_sigmoid_weight_on_eps():
    # SiD2 eq. 4: the weight on eps is sigmoid(B - lambda) (-lambda').
    for path in (paths.trigonometric(), paths.vp_cosine()):
        for bias in (0.0, -3.0, 1.0):
            want = 1 / (1 + np.exp(path.log_snr(T) - bias)) * -path.dlog_snr(T)
            np.testing.assert_allclose(loss_weight({"name": "sigmoid", "bias": bias}, path, "eps", T), want, rtol=1e-10)


def test_truncated_snr_is_the_larger_of_the_two_errors():
    path, t = paths.trigonometric(), jnp.asarray(T)
    x, z, error = jax.random.normal(jax.random.key(0), (3, len(T), 7), jnp.float64)
    x_t = path.perturb(x, z, t)
    of_eps = predictions.convert(path, "x", "eps", x + error, x_t, t) - z
    larger = jnp.maximum(jnp.sum(error**2, 1), jnp.sum(of_eps**2, 1))
    np.testing.assert_allclose(loss_weight("truncated_snr", path, "x", t) * jnp.sum(error**2, 1), larger, rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_weights_are_finite_at_both_ends(path, dtype):
    t = jnp.asarray([0.0, 1e-7, 0.5, 1.0], dtype)
    for name in WEIGHTS:
        for prediction in PREDICTIONS:
            w = loss_weight(name, path, prediction, t)
            assert w.dtype == dtype and w.shape == (4,), (name, prediction)
            assert np.isfinite(w).all() and (w >= 0).all(), (name, prediction, w)


def test_zero_signal_has_weight_one_on_eps():
    # The limit of min(SNR, g) / SNR, and what the reference code of min-SNR writes where SNR = 0.
    for path in (paths.rectified(), paths.trigonometric(), paths.vp_cosine()):
        for name in ("snr", "min_snr"):
            np.testing.assert_allclose(loss_weight(name, path, "eps", 1.0), 1.0, rtol=1e-9)


def test_weights_stop_where_the_prediction_is_singular():
    path = paths.rectified()
    low, high = times.interval(path, "score")
    for t, bound in ((0.0, low), (1.0, high)):
        np.testing.assert_allclose(loss_weight("x", path, "score", t), loss_weight("x", path, "score", bound), rtol=1e-12)
    assert loss_weight("velocity", path, "velocity", 1.0) == 1.0  # nowhere singular: exact to the ends
    np.testing.assert_allclose(loss_weight("snr", path, "velocity", 0.0), 1.0, rtol=1e-14)


def test_scalar_and_traced_times():
    path = paths.trigonometric()
    assert loss_weight("snr", path, "x", 0.5).shape == ()
    traced = jax.jit(lambda t: loss_weight({"name": "min_snr", "gamma": 3}, path, "eps", t))(jnp.asarray(T))
    np.testing.assert_allclose(traced, loss_weight({"name": "min_snr", "gamma": 3}, path, "eps", T), rtol=1e-12)


@pytest.mark.parametrize(
    "section, words",
    [
        ("sigma_sqrt", "weight.name = 'sigma_sqrt'"),
        ({"name": "snr", "gamma": 5}, "weight.gamma"),
        ({"name": "min_snr", "gamma": "5"}, "float"),
    ],
)
def test_bad_sections_are_refused_by_name(section, words):
    with pytest.raises(ConfigError, match=words):
        loss_weight(section, paths.rectified(), "eps", 0.5)
