import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import paths, predictions
from flowjax.paths import PATHS
from flowjax.predictions import PREDICTIONS, Model

pytestmark = pytest.mark.usefixtures("float64")

TIMES = np.array([0.02, 0.11, 0.37, 0.5, 0.76, 0.97])


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]()


def pair(n=len(TIMES), shape=(3, 2)):
    x, z = jax.random.normal(jax.random.key(1), (2, n, *shape), jnp.float64)
    return x, z


def by_definition(path, name, x, z, t):
    """Targets as their papers state them, for one time; derivatives by central differences."""
    a, b, h = path.a(t), path.b(t), 1e-6
    x_t = a * x + b * z
    if name == "velocity":
        return (path.a(t + h) - path.a(t - h)) / (2 * h) * x + (path.b(t + h) - path.b(t - h)) / (2 * h) * z
    if name == "score":
        return -(x_t - a * x) / b**2  # gradient of log N(x_t; a x, b^2)
    if name == "edm":
        # Solve D = c_skip x_sigma + c_out F for D = x (2206.00364, table 1), with x_sigma = x_t / a.
        sigma, data = b / a, 0.5
        c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / np.sqrt(sigma**2 + data**2)
        return (x - c_skip * x_t / a) / c_out
    return {"x": x, "eps": z, "v": a * z - b * x}[name]


def test_the_table_is_complete():
    assert set(PREDICTIONS) == {"x", "eps", "velocity", "v", "score", "edm"}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_targets_are_what_the_papers_say(path, name):
    x, z = pair()
    y = predictions.target(path, name, x, z, jnp.asarray(TIMES))
    for i, t in enumerate(TIMES):
        np.testing.assert_allclose(y[i], by_definition(path, name, x[i], z[i], t), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("source, goal", list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_conversion_on_every_path(source, goal):
    x, z = pair()
    t = jnp.asarray(TIMES)
    for make in PATHS.values():
        path = make()
        x_t = path.perturb(x, z, t)
        y, want = (predictions.target(path, name, x, z, t) for name in (source, goal))
        got = predictions.convert(path, source, goal, y, x_t, t)
        scale = np.abs(want).max(axis=(1, 2), keepdims=True)  # single entries may be near zero by chance
        condition = np.maximum(1.0, np.maximum(path.sigma(t), 1 / path.sigma(t)))[:, None, None] ** 2
        assert (np.abs(got - want) / scale / condition < 1e-12).all(), path.name
        back = predictions.convert(path, goal, source, got, x_t, t)
        assert (np.abs(back - y) / np.abs(y).max(axis=(1, 2), keepdims=True) / condition < 1e-12).all(), path.name


def test_random_rows_cycle(monkeypatch):
    # Any (a, b, c, d), not only the rows of the table.
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, c, d = rng.normal(size=4)
        monkeypatch.setitem(PREDICTIONS, "random", lambda path, t, c=c, d=d: (c * jnp.ones_like(t), d * jnp.ones_like(t)))
        path = paths.Path("random", lambda t, a=a: a + 0 * t, lambda t, b=b: b + 0 * t, lambda s: s)
        x, z = rng.normal(size=(2, 4, 3))
        x_t, y = a * x + b * z, c * x + d * z
        x_hat, z_hat = predictions.to_x_and_z(path, "random", y, x_t, 0.5)
        tolerance = 1e-13 * (1 + 1 / abs(a * d - b * c))
        np.testing.assert_allclose(x_hat, x, atol=10 * tolerance)
        np.testing.assert_allclose(z_hat, z, atol=10 * tolerance)
        np.testing.assert_allclose(predictions.convert(path, "x", "random", x_hat, x_t, 0.5), y, atol=100 * tolerance)


def test_rectified_endpoints_of_the_straight_line():
    path, (x, z) = paths.rectified(), pair()
    t = jnp.asarray(TIMES)
    x_t, v = path.perturb(x, z, t), z - x
    along = t[:, None, None]
    x_hat, z_hat = predictions.to_x_and_z(path, "velocity", v, x_t, t)
    np.testing.assert_allclose(x_hat, x_t - along * v, atol=1e-13)
    np.testing.assert_allclose(z_hat, x_t + (1 - along) * v, atol=1e-13)
    score = predictions.convert(path, "velocity", "score", v, x_t, t)
    np.testing.assert_allclose(score, -(x_t + (1 - along) * v) / along, rtol=1e-10)


def test_edm_row_is_minus_trigflow():
    # F_EDM is v-prediction in data-normalised trigonometric coordinates with the opposite sign.
    path = paths.trigonometric(sigma_data=0.5)
    x, z = pair()
    t = jnp.asarray(TIMES)
    theta = (np.pi / 2 * TIMES)[:, None, None]
    trigflow = np.cos(theta) * z - np.sin(theta) * x / 0.5
    np.testing.assert_allclose(predictions.target(path, "edm", x, z, t), -trigflow, rtol=1e-10, atol=1e-12)


def test_edm_gain_is_the_edm_weight():
    # lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 is 8 at sigma = sd = 0.5.
    path = paths.edm()
    np.testing.assert_allclose(predictions.gain(path, "edm", path.time_of_sigma(0.5)) ** 2, 8.0, rtol=1e-12)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_gain_scales_errors(path, name):
    x, z = pair()
    t = jnp.asarray(TIMES)
    x_t = path.perturb(x, z, t)
    error = 0.3 * pair()[1] + 0.1
    x_hat = x + error
    y, y_hat = (predictions.convert(path, "x", name, value, x_t, t) for value in (x, x_hat))
    want = predictions.gain(path, name, t) * jnp.linalg.norm(error.reshape(6, -1), axis=1)
    np.testing.assert_allclose(jnp.linalg.norm((y_hat - y).reshape(6, -1), axis=1), want, rtol=1e-9)


# What each kind determines at the two ends; the rest is singular by nature (0/0 or 1/0) and documented as such.
FINITE = {
    ("rectified", 0.0): {"velocity": {"x", "velocity", "eps", "v", "edm"}, "v": {"x", "velocity", "eps", "v", "edm"}},
    ("rectified", 1.0): {
        "velocity": {"x", "velocity", "eps", "v", "score", "edm"},
        "x": {"x", "velocity", "eps", "v", "score", "edm"},
        "v": {"x", "velocity", "eps", "v", "score", "edm"},
    },
}


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_limits_at_the_ends(end):
    path, (x, z) = paths.rectified(), pair()
    x_t = path.perturb(x, z, end)
    for source, goals in FINITE["rectified", end].items():
        y = predictions.target(path, source, x, z, end)
        for goal in goals:
            got = predictions.convert(path, source, goal, y, x_t, end)
            np.testing.assert_allclose(got, predictions.target(path, goal, x, z, end), atol=1e-13, err_msg=f"{source} {goal}")
    v = z - x
    np.testing.assert_allclose(predictions.convert(path, "velocity", "x", v, z, 1.0), z - v, atol=1e-15)


SINGULAR = [("eps", "x", 1.0), ("score", "x", 1.0), ("x", "eps", 0.0), ("velocity", "score", 0.0)]


@pytest.mark.parametrize("source, goal, end", SINGULAR)
def test_singular_ends_are_not_silently_wrong(source, goal, end):
    path, (x, z) = paths.rectified(), pair()
    y = predictions.target(path, source, x, z, end)
    assert not np.isfinite(predictions.convert(path, source, goal, y, path.perturb(x, z, end), end)).any()


def test_velocity_is_never_singular_inside_the_bounds(path):
    x, z = pair()
    for t in (path.t_min, path.t_max):
        y = predictions.target(path, "velocity", x, z, t)
        x_hat, z_hat = predictions.to_x_and_z(path, "velocity", y, path.perturb(x, z, t), t)
        np.testing.assert_allclose(x_hat, x, atol=1e-10)
        np.testing.assert_allclose(z_hat, z, atol=1e-10)


def test_unknown_names_are_refused():
    path, (x, z) = paths.rectified(), pair()
    for source, goal in (("nope", "x"), ("x", "nope"), ("nope", "nope")):
        with pytest.raises(ValueError, match="nope.*valid: x, eps"):
            predictions.convert(path, source, goal, x, z, 0.5)


def test_same_kind_is_returned_untouched():
    y = pair()[0]
    assert predictions.convert(paths.rectified(), "score", "score", y, y, 0.0) is y


def test_a_python_time_keeps_double_precision():
    path, (x, z) = paths.rectified(), pair()
    v = predictions.target(path, "velocity", x, z, 0.3)
    x_t = path.perturb(x, z, 0.3)
    np.testing.assert_allclose(predictions.convert(path, "velocity", "x", v, x_t, 0.3), x, atol=1e-14)
    perfect = Model(lambda x_t, t, cond, key: v * t[0] / 0.3, path, "velocity")
    np.testing.assert_allclose(perfect.get("x", x_t, 0.3), x, atol=1e-14)


def test_float32_stays_float32():
    x, z = (v.astype(jnp.float32) for v in pair())
    t = jnp.full((6,), 0.3, jnp.float32)
    assert predictions.convert(paths.vp_cosine(), "velocity", "eps", x, z, t).dtype == jnp.float32


def recorder(calls):
    def apply(x_t, t, cond, key):
        calls.append((t, cond, key))
        return x_t * 0.5

    return Model(apply, paths.rectified(), "velocity", lambda cond: {"label": -cond["label"]})


def test_model_calls_its_network_with_one_time_per_sample():
    calls = []
    model, x_t = recorder(calls), pair()[0]
    np.testing.assert_array_equal(model(x_t, 0.25, {"label": 1}, "key"), 0.5 * x_t)
    t, cond, key = calls[0]
    np.testing.assert_array_equal(t, np.full(6, 0.25))
    assert cond == {"label": 1} and key == "key"
    model(x_t, jnp.asarray(TIMES))
    np.testing.assert_array_equal(calls[1][0], TIMES)
    assert calls[1][1:] == (None, None)


def test_model_converts_with_one_call():
    calls = []
    model, x_t = recorder(calls), pair()[0]
    x_hat, z_hat = model.x_and_z(x_t, 0.25)
    np.testing.assert_allclose(x_hat, x_t - 0.25 * 0.5 * x_t, rtol=1e-13)
    np.testing.assert_allclose(z_hat, x_t + 0.75 * 0.5 * x_t, rtol=1e-13)
    assert len(calls) == 1
    np.testing.assert_allclose(model.get("x", x_t, 0.25), x_hat, rtol=1e-13)
    np.testing.assert_array_equal(model.get("velocity", x_t, 0.25), 0.5 * x_t)


def test_model_bind_fixes_the_condition():
    calls = []
    model, x_t = recorder(calls), pair()[0]
    bound = model.bind({"label": 7})
    bound(x_t, 0.5, key="k")
    assert calls[0][1:] == ({"label": 7}, "k")
    assert bound.prediction == "velocity" and bound.path is model.path
    assert model.null({"label": 2}) == {"label": -2}
    assert model.replace(prediction="x").prediction == "x" and model.prediction == "velocity"
