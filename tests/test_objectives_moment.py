"""Moment matching: half of the first moment's error by hand, the auxiliary halfway, samples of the posterior, who is trained by what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quadrature
from flowjax import exact, objectives, paths
from flowjax.config import ConfigError
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF, KEY = paths.rectified(), jax.random.key(0)
REAL, MEAN, STD = exact.gaussian([0.0], 0.25), 0.5, 0.8


def linear(c, k, path=RF):
    return Model(lambda x, t, cond, key: c + k * x, path, "x")


def players(**settings):
    return {p.role: p.loss for p in objectives.build({"name": "moment_matching", **settings}).players}


def grid(made, n=8, s=0.5):
    """t = 1, where x_t is noise, and x_s of what is `made` of it, with every pair of nodes of the two noises; the teacher knows REAL."""
    nodes, weights = quadrature.product(quadrature.normal(n), quadrature.normal(n))
    z, xi = (jnp.asarray(v)[:, None] for v in nodes.T)
    ones = jnp.ones(len(z))
    x_s = RF.perturb(made(z), xi, s)
    found = {"made": made(z), "taught": REAL.x_mean(RF, x_s, s * ones)}
    return {"x_t": z, "x_s": x_s, "t": ones, "s": s * ones, "cond": {}, **found}, jnp.asarray(weights)


def test_gradient_is_half_of_the_moments_error():
    """E[x_hat | x_s] of N(1/2, 0.64) and D of N(0, 1/4) at s = 1/2: the mean's error is 0.5 - 0.1 = 0.4, so d / d mean = 0.2, and
    d / d std = 0.0760976."""
    batch, weights = grid(lambda z: MEAN + STD * z)
    fake, half = exact.gaussian([MEAN], STD**2), jnp.full(1, 0.5)
    auxiliary = Model(lambda x, t, c, k: (fake.x_mean(RF, x, half) + REAL.x_mean(RF, x, half)) / 2, RF, "x")

    def total(theta):
        nets = {"net": linear(*theta), "auxiliary": auxiliary}
        return quadrature.expected(lambda b: players()["net"](nets, b, None), batch, weights)

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray([MEAN, STD])), [0.2, 0.0760976], rtol=1e-6)


def test_best_auxiliary_is_halfway():
    batch, weights = grid(lambda z: MEAN + STD * z)
    x = jnp.asarray([[0.0], [1.0]])
    values = (exact.gaussian([MEAN], STD**2).x_mean(RF, x, 0.5) + REAL.x_mean(RF, x, 0.5)) / 2
    best = jnp.asarray([values[0, 0], values[1, 0] - values[0, 0]])

    def total(theta):
        nets = {"net": linear(MEAN, STD), "auxiliary": linear(*theta)}
        return quadrature.expected(lambda b: players()["auxiliary"](nets, b, None), batch, weights)

    np.testing.assert_allclose(jax.grad(total)(best), 0, atol=1e-10)
    assert (np.abs(jax.grad(total)(best + 0.1)) > 1e-2).all()


def test_values_and_weights_by_hand():
    """x_hat = 3, D_auxiliary = 2, D_teacher = 1."""
    nets = {"net": linear(3.0, 0.0), "auxiliary": linear(2.0, 0.0)}
    zero = jnp.zeros((2, 1))
    batch = {"x_t": zero, "x_s": zero, "made": zero + 3, "taught": zero + 1, "t": jnp.ones(2), "s": jnp.asarray([0.5, 0.2]), "cond": {}}
    for settings, wanted in (({}, (3.0, 2.0, 1.0)), ({"weight": "snr"}, (3 * 8.5, 2 * 8.5, 1.0))):  # SNR 1 and 16, their mean 8.5
        loss = players(**settings)
        value, metrics = loss["auxiliary"](nets, batch, None)
        np.testing.assert_allclose([loss["net"](nets, batch, None)[0], value, metrics["gap"]], wanted, rtol=1e-9, atol=1e-12)


def test_what_is_asked_of_the_others_is_asked_of_the_states():
    """The student at x_t and t, the teacher at x_s and s: guided by 3 from x without the label to 2 x with it, it says 4 x."""
    null = lambda cond: {"label": jnp.ones_like(cond["label"])}  # noqa: E731
    teacher = Model(lambda x, t, c, k: jnp.where(c["label"] == 0, 2.0, 1.0)[:, None] * x + t[:, None], RF, "x", null)
    nets = {"net": Model(lambda x, t, c, k: 3 * x - t[:, None], RF, "x"), "teacher": teacher, "auxiliary": linear(0, 1)}
    batch = {"x": jnp.linspace(-1, 1, 6)[:, None], "cond": {"label": jnp.zeros(6, int)}}
    for guidance, factor in (("none", 2.0), ({"name": "cfg", "scale": 3.0}, 4.0)):
        out = objectives.build({"name": "moment_matching", "guidance": guidance}).rollout(nets, batch, KEY)
        np.testing.assert_allclose(out["made"], 3 * out["x_t"] - out["t"][:, None], atol=1e-12)
        np.testing.assert_allclose(out["taught"], factor * out["x_s"] + out["s"][:, None], atol=1e-12)


def test_each_player_trains_itself_alone():
    batch, _ = grid(lambda z: z, 3)

    def loss(role, theta):
        return players()[role]({"net": linear(theta[0], 0.7), "auxiliary": linear(theta[1], 0.5)}, batch, None)[0]

    theta = jnp.asarray([0.3, 0.5])
    assert [bool(g != 0) for g in jax.grad(lambda v: loss("net", v))(theta)] == [True, False]
    assert [bool(g != 0) for g in jax.grad(lambda v: loss("auxiliary", v))(theta)] == [False, True]


def rolled(net, n=20_000, path=RF, x=0.0, **settings):
    bound = objectives.build({"name": "moment_matching", **settings})
    other = Model(lambda x, t, c, k: x, path, "velocity")
    out = bound.rollout({"net": net, "auxiliary": other, "teacher": other}, {"x": jnp.full((n, 1), x), "cond": {}}, KEY)
    return {k: np.asarray(out[k], np.float64) for k in ("t", "s", "x_t", "x_s")}


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "edm"])
def test_states_are_a_step_of_ancestral_sampling_apart(path):
    """A student that knows the data, 2 everywhere: x_s has the law of its time, and the chain's correlation (a_t / a_s) (b_s / b_t)."""
    path = paths.PATHS[path]()
    out = rolled(linear(2.0, 0.0, path), path=path, x=2.0, steps=4, time={"name": "uniform", "t_min": 0.2})
    t, s = out["t"], out["s"]
    noise = [(out[k][:, 0] - 2 * np.asarray(path.a(v))) / np.asarray(path.b(v)) for k, v in (("x_t", t), ("x_s", s))]
    for part in noise:
        assert abs(part.mean()) < 0.03 and abs(part.std() - 1) < 0.03
    wanted = np.asarray(path.a(t) / path.a(s) * path.b(s) / path.b(t))
    for low, high in ((0.2, 0.5), (0.5, 0.9)):
        rows = (s > low) & (s < high)
        assert abs((noise[0] * noise[1])[rows].mean() - wanted[rows].mean()) < 0.04


def test_times():
    out = rolled(linear(0.0, 1.0), steps=4)
    t, s = out["t"], out["s"]
    assert (t > s).all() and (t - s).max() < 0.2501
    np.testing.assert_allclose([(t - s).min(), s.max()], [1e-3, 0.999], rtol=1e-3)
    default = rolled(linear(0.0, 1.0))
    assert 0.124 < (default["t"] - default["s"]).max() < 0.1251
    assert abs((t == 1).mean() - 1 / 8) < 0.01  # s + U / 4 > 1 for half of the last quarter
    inner = s < 0.7
    assert abs((t - s)[inner].mean() - 1 / 8) < 0.005 and abs(s.mean() - 0.5) < 0.01
    assert abs((rolled(linear(0.0, 1.0), steps=1)["t"] == 1).mean() - 0.5) < 0.02
    eps = rolled(Model(lambda x, t, c, k: x, RF, "eps"), steps=2)
    assert eps["t"].max() == pytest.approx(1000 / 1001)


def test_refusals():
    batch, other = {"x": jnp.zeros((2, 1)), "cond": {}}, linear(0, 1, paths.trigonometric())
    bound = objectives.build("moment_matching")
    for role in ("teacher", "auxiliary"):
        nets = {"net": linear(0, 1), "auxiliary": linear(0, 1), "teacher": linear(0, 1), role: other}
        with pytest.raises(ConfigError, match=f"roles.{role} was trained with another path"):
            bound.rollout(nets, batch, KEY)
    with pytest.raises(ConfigError, match="objective.steps = 0"):
        rolled(linear(0, 1), steps=0)


def of_line(line, null=None):
    of = lambda line: Model(lambda x, t, c, k: line["c"] + line["k"] * x, RF, "x", null)  # noqa: E731
    return of(line).replace(params=line, of=of)


def test_gradients_by_the_teachers_parameters_by_hand():
    """Halves with x_hat - D = 3, 1 at x_s = 1, 2: gradients by (c, k) are -2 (3, 3 * 1) and -2 (1, 1 * 2), times omega; their product 4 * 9."""
    batch = {"x_t": jnp.asarray([[4.0], [3.0]]), "x_s": jnp.asarray([[1.0], [2.0]]), "t": jnp.ones(2), "s": jnp.full(2, 0.5), "cond": {}}
    nets = {"net": linear(0.0, 1.0), "teacher": of_line({"c": jnp.asarray(0.0), "k": jnp.asarray(1.0)})}
    for weight, factor in (("none", 1), ({"name": "snr"}, 1), ("velocity", 16)):  # at s = 1/2 SNR is 1 and 1 / s^2 four
        loss = objectives.build({"name": "parameter_moment_matching", "weight": weight}).players[0].loss
        (value, metrics), slope = jax.value_and_grad(lambda m: loss(nets | {"net": linear(m, 1.0)}, batch, None), has_aux=True)(0.0)  # noqa: B023
        np.testing.assert_allclose([value, metrics["gap"]], [36 * factor, 5**0.5], rtol=1e-6)
        # d / dm of x_hat = m + x_t: 4 ((3 + m) (1 + m) + (3 + m) (2 + 2 m)) = 12 (3 + m) (1 + m).
        np.testing.assert_allclose(slope, 48 * factor, rtol=1e-6)
    with pytest.raises(ConfigError, match="batch_size = 1 should be even"):
        loss(nets, jax.tree.map(lambda v: v[:1], batch), None)


def test_guidance_is_around_the_parameters():
    """Guided by 3 from c without the label to c + k x with it the teacher says c + 3 k x: at x_s = 1, x_hat = 4 agrees with c = 1, k = 1."""
    null = lambda cond: {"label": jnp.ones_like(cond["label"])}  # noqa: E731
    of = lambda k: Model(lambda x, t, c, key: 1 + k * jnp.where(c["label"] == 0, 1.0, 0.0)[:, None] * x, RF, "x", null)  # noqa: E731
    teacher = of(1.0).replace(params=jnp.asarray(1.0), of=of)
    batch = {"x_t": jnp.ones((2, 1)), "x_s": jnp.ones((2, 1)), "t": jnp.ones(2), "s": jnp.full(2, 0.5), "cond": {"label": jnp.zeros(2, int)}}
    loss = objectives.build({"name": "parameter_moment_matching", "guidance": {"name": "cfg", "scale": 3.0}}).players[0].loss
    assert loss({"net": linear(0.0, 4.0), "teacher": teacher}, batch, None)[0] == 0
    assert loss({"net": linear(0.0, 5.0), "teacher": teacher}, batch, None)[0] == pytest.approx(36)  # (2 * 3)^2


def test_states_are_those_of_the_other_form():
    nets = {"net": linear(0.2, 0.5), "teacher": linear(0.0, 1.0)}
    batch = {"x": jnp.linspace(-1, 1, 6)[:, None], "cond": {}}
    one, other = (objectives.build(n).rollout(nets, batch, KEY) for n in ("moment_matching", "parameter_moment_matching"))
    assert other.keys() == one.keys() - {"taught"} and all((one[k] == other[k]).all() for k in ("t", "s", "x_t", "x_s", "made"))
    with pytest.raises(ConfigError, match="roles.teacher was trained with another path"):
        objectives.build("parameter_moment_matching").rollout(nets | {"teacher": linear(0, 1, paths.trigonometric())}, batch, KEY)
