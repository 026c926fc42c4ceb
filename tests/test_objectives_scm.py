"""Continuous-time consistency: the tangent against finite differences and the paper's formula, the same on every path, zero at the solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quadrature
from flowjax import exact, objectives, paths, predictions
from flowjax.config import ConfigError
from flowjax.objectives import scm
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF, TRIG = paths.rectified(), paths.trigonometric()
DATA = exact.gaussian([0.3], 0.25)
LINE = exact.mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])
X_T, T = np.asarray([[0.8], [-0.4], [1.3]]), np.asarray([0.6, 0.25, 0.9])  # of jax they would be of single precision here


def consistent(path, prediction="velocity", data=DATA):
    """The network whose x-prediction is the exact consistency function."""

    def apply(x_t, t, cond, key):
        return predictions.convert(path, "x", prediction, data.consistency(path, x_t, t), x_t, t)

    return Model(apply, path, prediction)


def wavy(path, prediction):
    return Model(lambda x_t, t, cond, key: jnp.sin(2 * x_t) * t[:, None] + 0.3 * x_t**2, path, prediction)


def tangent(net, x_t=X_T, t=T, v=None, warm=1.0, data=LINE):
    return scm.tangent(net, x_t, t, data.velocity(net.path, x_t, t) if v is None else v, {}, None, warm)


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_cosine", "edm"])
@pytest.mark.parametrize("prediction", ["velocity", "v", "eps", "edm"])
def test_tangent_is_the_derivative_of_f_along_the_flow(path, prediction):
    """g = a / W det df/dt, df/dt by central differences along the straight line with the flow's velocity."""
    path = paths.PATHS[path]()
    net, h = wavy(path, prediction), 1e-6
    v = LINE.velocity(path, X_T, T)
    f = lambda e: net.get("x", X_T + e * v, T + e)  # noqa: E731
    change = (f(h) - f(-h)) / (2 * h)
    c, d = predictions.row(path, prediction, T)
    by = path.a(T) / path.wronskian(T) * (path.a(T) * d - path.b(T) * c)
    np.testing.assert_allclose(tangent(net)[1], by[:, None] * change, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("warm", [1.0, 0.3, 0.0])
def test_trigflow_is_algorithm_1(warm):
    """cos^2 (dx/dth - F) - r cos sin (x + dF/dth) with the angle th = pi t / 2, F the network and dF/dth by central differences."""
    net, h = wavy(TRIG, "v"), 1e-6
    angle = np.pi / 2 * T[:, None]
    v = LINE.velocity(TRIG, X_T, T) / (np.pi / 2)
    F = lambda e: net(X_T + e * v, T + e / (np.pi / 2))  # noqa: E731
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    ours = cos**2 * (v - F(0.0)) - warm * cos * sin * (X_T + (F(h) - F(-h)) / (2 * h))
    np.testing.assert_allclose(tangent(net, warm=warm)[1], ours, rtol=1e-6, atol=1e-9)


def test_tangent_of_a_diffusion_model_by_hand():
    """N(0, 1/4) on the rectified path, x = 0.8, t = 0.6: dv/dt = 1.25 along the flow, hence df/dt = -0.6 1.25 and g = 0.4 df/dt."""
    data = exact.gaussian([0.0], 0.25)
    y, g = tangent(data.model(RF), jnp.asarray([[0.8]]), jnp.asarray([0.6]), data=data)
    np.testing.assert_allclose(g, 0.4 * -0.75, rtol=1e-9)
    np.testing.assert_allclose(y, data.velocity(RF, jnp.asarray([[0.8]]), 0.6))


@pytest.mark.parametrize("prediction", ["velocity", "v", "eps"])
def test_the_change_of_f_is_the_same_on_every_path(prediction):
    """The same denoiser, not a consistent one, at the same noise levels: -(b / det) g changes f by as much."""
    changes = []
    for path in (RF, TRIG, paths.vp_linear(), paths.edm()):
        sigma = jnp.asarray([0.3, 1.0, 4.0])
        t = path.time_of_sigma(sigma)
        x_t = path.a(t)[:, None] * jnp.asarray([[0.8], [-0.4], [1.3]])
        c, d = predictions.row(path, prediction, t)
        g = tangent(LINE.model(path, prediction), x_t, t)[1]
        changes.append(-(path.b(t) / (path.a(t) * d - path.b(t) * c))[:, None] * g)
    assert np.abs(changes[0]).min() > 1e-4
    for other in changes[1:]:
        np.testing.assert_allclose(other, changes[0], rtol=1e-6)


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_cosine", "edm"])
def test_consistency_function_has_no_tangent(path):
    path = paths.PATHS[path]()
    for prediction in ("velocity", "v"):
        g = tangent(consistent(path, prediction), data=DATA)[1]
        np.testing.assert_allclose(g, 0, atol=1e-10 * float(jnp.max(path.b(T))) ** 2)


def batch(n=16, step=0):
    key = jax.random.split(jax.random.key(0))
    x, z = (jax.random.normal(k, (n, 2)) for k in key)
    return {"x": x, "z": z, "t": jnp.linspace(0.1, 0.95, n), "cond": {}, "step": jnp.asarray(step)}


def loss(net, name="scm_distillation", data=LINE, given=None, **settings):
    player = objectives.build({"name": name, **settings}).players[0]
    return player.loss({"net": net, "teacher": data.model(RF)}, given or batch(), None)


def test_gradient_is_the_tangent():
    """d L / d theta = -2 E sum_dims g dy/dtheta, whether g is normed or not; nothing reaches the teacher or runs through the tangent."""
    data = exact.gaussian([0.3, -0.1], 0.25)
    net = lambda k: Model(lambda x, t, c, key: k * jnp.sin(2 * x), RF, "velocity")  # noqa: E731
    given = batch()
    x_t = RF.perturb(given["x"], given["z"], given["t"])
    for settings in ({"normalise": False}, {"offset": 0.1}, {"offset": 3.0}):
        got = jax.grad(lambda k: loss(net(k), data=data, given=given, warmup=0, **settings)[0])(0.7)
        g = scm.tangent(net(0.7), x_t, given["t"], data.velocity(RF, x_t, given["t"]), {}, None, 1.0)[1]
        if "offset" in settings:
            g = g / (jnp.linalg.norm(g, axis=1, keepdims=True) + settings["offset"])
        np.testing.assert_allclose(got, -2 * jnp.mean(jnp.sum(g * jnp.sin(2 * x_t), axis=1)), rtol=1e-9)
    value, metrics = loss(net(0.7), data=data, given=given, warmup=0, offset=1e-9)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)  # a normed tangent
    raw = loss(net(0.7), data=data, given=given, warmup=0, normalise=False)
    np.testing.assert_allclose(raw[0], 2 * metrics["tangent"] ** 2, rtol=1e-9)


def test_warm_up_brings_the_derivative_in():
    """Steps 0, 3 and 20 of a warm-up of 10 have r = 0, 0.3 and 1; r = 0 pulls y to the flow's velocity, with a weight of 1 - t."""
    net, data = wavy(RF, "velocity"), exact.gaussian([0.3, -0.1], 0.25)
    for step, warm in ((0, 0.0), (3, 0.3), (20, 1.0)):
        given = batch(step=step)
        x_t = RF.perturb(given["x"], given["z"], given["t"])
        g = scm.tangent(net, x_t, given["t"], data.velocity(RF, x_t, given["t"]), {}, None, warm)[1]
        found = loss(net, data=data, given=given, warmup=10, normalise=False)[0]
        np.testing.assert_allclose(found, jnp.mean(jnp.sum(g**2, axis=1)), rtol=1e-9)
        if step == 0:
            np.testing.assert_allclose(g, (1 - given["t"])[:, None] * (data.velocity(RF, x_t, given["t"]) - net(x_t, given["t"])), rtol=1e-9)


def test_training_has_the_same_expected_tangent_as_distillation():
    x, z, weights = quadrature.mixture_and_noise(LINE, 24)
    given = {"x": x, "z": z, "t": jnp.full(len(x), 0.6), "cond": {}}

    def gradient(name):
        player = objectives.build({"name": name, "warmup": 0, "normalise": False}).players[0]

        def total(k):
            nets = {"net": Model(lambda x, t, c, key: k[0] * x + k[1] * t[:, None], RF, "velocity"), "teacher": LINE.model(RF)}
            return quadrature.expected(lambda b: player.loss(nets, {**b, "step": 0}, None), given, weights)

        return jax.jit(jax.grad(total))(jnp.asarray([1.0, -0.3]))

    taught, alone = gradient("scm_distillation"), gradient("scm_training")
    np.testing.assert_allclose(alone, taught, rtol=1e-6)
    assert np.abs(taught).min() > 1e-2


def test_teacher_is_guided():
    """Constant velocities 1 with the label and -1/2 without: at scale 3 the tangent at r = 0 is (1 - t) (4 - u)."""
    null = lambda cond: {"label": jnp.ones_like(cond["label"])}  # noqa: E731
    teacher = Model(lambda x, t, c, k: jnp.where(c["label"] == 0, 1.0, -0.5)[:, None] + 0 * x, RF, "velocity", null)
    net = Model(lambda x, t, c, k: 0 * x, RF, "velocity")
    given = {"x": jnp.ones((1, 1)), "z": jnp.ones((1, 1)), "t": jnp.asarray([0.2]), "cond": {"label": jnp.zeros(1, int)}, "step": 0}
    for guidance, v in (("none", 1.0), ({"name": "cfg", "scale": 3.0}, 4.0)):
        player = objectives.build({"name": "scm_distillation", "guidance": guidance, "warmup": 5, "normalise": False}).players[0]
        np.testing.assert_allclose(player.loss({"net": net, "teacher": teacher}, given, None)[0], (0.8 * v) ** 2)


def test_dropout_reaches_the_network():
    net = Model(lambda x, t, c, key: x * jax.random.bernoulli(key, 0.5, x.shape), RF, "velocity")
    player = objectives.build({"name": "scm_training", "normalise": False}).players[0]
    one, two = (player.loss({"net": net}, batch(), jax.random.key(i))[0] for i in range(2))
    assert one != two


def test_refusals():
    with pytest.raises(ConfigError, match=r"need f\(x, 0\) = x, which prediction 'x'"):
        objectives.build("scm_training").rollout({"net": DATA.model(RF, "x")}, {"x": jnp.zeros((2, 1)), "cond": {}}, jax.random.key(0))
    with pytest.raises(ConfigError, match="roles.teacher was trained with another path"):
        loss(DATA.model(TRIG), data=DATA)
    for settings in ({"warmup": -1}, {"offset": -0.1}):
        with pytest.raises(ConfigError, match="should be at least 0"):
            loss(wavy(RF, "velocity"), data=exact.gaussian([0.3, -0.1], 0.25), **settings)


def test_published_settings_are_the_defaults():
    net, data = wavy(RF, "velocity"), exact.gaussian([0.3, -0.1], 0.25)
    given = batch(step=2500)
    for name in ("scm_distillation", "scm_training"):
        assert loss(net, name, data=data, given=given)[0] == loss(net, name, data=data, given=given, warmup=10_000, offset=0.1, normalise=True)[0]
