"""Distribution matching: the gradient is that of the divergence of two Gaussians; the student's own trajectory; who is trained by what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quadrature
from flowjax import exact, objectives, paths
from flowjax.config import ConfigError
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF = paths.rectified()
REAL, MEAN, STD = exact.gaussian([0.0], 0.25), 0.5, 0.8


def generator(m, s, path=RF):
    return Model(lambda x, t, cond, key: m + s * x, path, "x")


def grid(n=8, t=0.5):
    nodes, weights = quadrature.product(quadrature.normal(n), quadrature.normal(n))
    z_in, z_t = (jnp.asarray(v)[:, None] for v in nodes.T)
    time = jnp.full(len(z_in), t)
    return {"x": z_in, "x_in": z_in, "tau": jnp.ones_like(time), "t": time, "z_t": z_t, "cond": {}}, jnp.asarray(weights)


def player(role="net", **settings):
    bound = objectives.build({"name": "distribution_matching", **settings})
    return next(p for p in bound.players if p.role == role)


def test_gradient_is_that_of_the_divergence():
    """d KL(N(m_t, .) || real_t) / d mean = a^2 (m_f - m_r) / V_r = 0.4 and / d std = a^2 s_f (1 / V_r - 1 / V_f) = 0.152195 at t = 1/2,
    by hand; the loss leaves out the factor a^2 / b^2 = 1 between differences of images and of scores times a."""
    batch, weights = grid()
    nets = {"fake": exact.gaussian([MEAN], STD**2).model(RF), "teacher": REAL.model(RF)}
    loss = player(normalise=False).loss

    def total(theta):
        return quadrature.expected(lambda b: loss({**nets, "net": generator(*theta)}, b, None), batch, weights)

    np.testing.assert_allclose(jax.grad(total)(jnp.asarray([MEAN, STD])), [0.4, 0.15219512], rtol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_equal_distributions_leave_nothing_to_do(normalise):
    batch, _ = grid()
    nets = {"fake": REAL.model(RF), "teacher": REAL.model(RF)}
    value, grad = jax.value_and_grad(lambda m: player(normalise=normalise).loss({**nets, "net": generator(m, 1.0)}, batch, None)[0])(0.3)
    assert value == 0 and grad == 0


def test_norm_is_per_example():
    """Scaling one example's difference and distance together changes nothing; the value is half the mean square of g."""
    batch, _ = grid(3)
    nets = {"fake": exact.gaussian([MEAN], STD**2).model(RF), "teacher": REAL.model(RF), "net": generator(0.1, 0.7)}
    value, metrics = player().loss(nets, batch, None)
    x = 0.1 + 0.7 * batch["x_in"]
    x_t = RF.perturb(x, batch["z_t"], 0.5)
    fake, real = (nets[k].get("x", x_t, 0.5) for k in ("fake", "teacher"))
    g = (fake - real) / jnp.abs(x - real)
    np.testing.assert_allclose(value, 0.5 * jnp.mean(g**2), rtol=1e-9)
    np.testing.assert_allclose(metrics["gradient"], jnp.sqrt(jnp.mean(g**2)), rtol=1e-9)


def test_the_norm_is_the_mean_distance_over_dimensions():
    """By hand: x - D is (1, 3), of mean 2, and D_fake - D is (2, -2)."""
    says = lambda *x: Model(lambda x_t, t, c, k: jnp.asarray([x]), RF, "x")  # noqa: E731
    one = jnp.ones((1, 2))
    batch = {"x_in": one, "z_t": one, "tau": jnp.ones(1), "t": jnp.full(1, 0.5), "cond": {}}
    value, metrics = player().loss({"net": says(1.0, 3.0), "teacher": says(0.0, 0.0), "fake": says(2.0, -2.0)}, batch, None)
    assert float(value) == pytest.approx(0.5) and float(metrics["gradient"]) == pytest.approx(1.0)


def test_each_player_trains_itself_alone():
    batch, _ = grid(3)
    batch |= {"fake_t": batch["t"], "fake_z": batch["z_t"]}

    def loss(role, theta):
        nets = {"net": generator(theta[0], 0.7), "fake": Model(lambda x, t, c, k: theta[1] * x, RF, "velocity"),
                "teacher": Model(lambda x, t, c, k: theta[2] * x, RF, "velocity")}  # fmt: skip
        return player(role).loss(nets, batch, None)[0]

    theta = jnp.asarray([0.3, 0.5, -0.2])
    assert [bool(g != 0) for g in jax.grad(lambda v: loss("net", v))(theta)] == [True, False, False]
    assert [bool(g != 0) for g in jax.grad(lambda v: loss("fake", v))(theta)] == [False, True, False]


@pytest.mark.parametrize("path", ["rectified", "vp_cosine"])
def test_student_meets_the_states_of_its_own_trajectory(path):
    """Of a student that always answers c: at its first time pure noise, later a c + b xi, each time as often as the others."""
    path = paths.PATHS[path]()
    net = Model(lambda x, t, cond, key: jnp.full_like(x, 3.0), path, "x")
    nets = {"net": net, "fake": net, "teacher": net}
    bound = objectives.build({"name": "distribution_matching", "steps": 4})
    n = 8000
    batch = bound.rollout(nets, {"x": jnp.zeros((n, 1)), "cond": {}}, jax.random.key(0))
    taus = np.unique(np.asarray(batch["tau"]))
    assert len(taus) == 4
    for i, tau in enumerate(taus):
        x = np.asarray(batch["x_in"])[np.asarray(batch["tau"]) == tau]
        assert abs(len(x) - n / 4) < 5 * np.sqrt(n * 3 / 16)
        mean = 0.0 if i == 3 else 3 * float(path.a(tau))
        assert abs(x.mean() - mean) < 5 * float(path.b(tau)) / np.sqrt(len(x)) and abs(x.std() / float(path.b(tau)) - 1) < 0.06
    draws = [np.asarray(batch[k]).ravel() for k in ("t", "fake_t", "z_t", "fake_z")]
    assert np.abs(np.corrcoef(draws)[np.triu_indices(4, 1)]).max() < 0.06  # their own


def test_later_states_follow_from_earlier_ones():
    """x_in at the second time is the answer at the first, noised: of an identity student 0.5 z + 0.5 xi, of variance 1/2."""
    net = Model(lambda x, t, cond, key: x, RF, "x")
    bound = objectives.build({"name": "distribution_matching", "steps": 2})
    batch = bound.rollout({"net": net, "fake": net, "teacher": net}, {"x": jnp.zeros((8000, 1)), "cond": {}}, jax.random.key(1))
    late = np.asarray(batch["x_in"])[np.asarray(batch["tau"]) == 0.5]
    np.testing.assert_allclose(late.var(), 0.5, rtol=0.08)


def test_regression_on_couplings():
    batch, _ = grid(3)
    nets = {"fake": REAL.model(RF), "teacher": REAL.model(RF), "net": generator(0.0, 1.0)}
    z = batch["x_in"]
    coupled = {**batch, "x": 2 * z, "z": z}  # the net answers z at t = 1
    value, metrics = player(regression=0.25).loss(nets, coupled, None)
    np.testing.assert_allclose(value - player().loss(nets, batch, None)[0], 0.25 * jnp.mean(z**2), rtol=1e-9)
    with pytest.raises(ConfigError, match="needs couplings"):
        player(regression=0.25).loss(nets, batch, None)
    with pytest.raises(ConfigError, match="the data are couplings"):
        player().loss(nets, coupled, None)


def test_regression_begins_where_the_network_determines_the_image():
    """Of eps at sigma = 1,000 and not at pure noise, where eps says nothing of x. By hand: of N(0, 1/4) the exact answer is a / 4 / (a^2 / 4 + b^2) x_t."""
    batch, _ = grid(3)
    nets = {"fake": REAL.model(RF), "teacher": REAL.model(RF), "net": REAL.model(RF, "eps")}
    z = batch["x_in"]
    inside = {**batch, "tau": 0.999 * batch["tau"], "x": 0.5 * z, "z": z}
    value, metrics = player(regression=0.25).loss(nets, inside, None)
    a, b = 1 / 1001, 1000 / 1001
    answer = a / 4 / (a**2 / 4 + b**2) * (0.5 * a + b) * z
    assert jnp.isfinite(value)
    np.testing.assert_allclose(metrics["regression"], jnp.mean((answer - 0.5 * z) ** 2), rtol=1e-6)


def test_refusals():
    nets = {"net": generator(0, 1), "fake": generator(0, 1), "teacher": generator(0, 1, paths.trigonometric())}
    batch = {"x": jnp.zeros((2, 1)), "cond": {}}
    with pytest.raises(ConfigError, match="roles.teacher was trained with another path"):
        objectives.build("distribution_matching").rollout(nets, batch, jax.random.key(0))
    with pytest.raises(ConfigError, match="objective.steps = 0"):
        objectives.build({"name": "distribution_matching", "steps": 0}).rollout({**nets, "teacher": nets["net"]}, batch, jax.random.key(0))


def test_one_step_is_the_default_and_begins_at_pure_noise():
    net = generator(3.0, 0.0)
    batch = objectives.build("distribution_matching").rollout(
        {"net": net, "fake": net, "teacher": net}, {"x": jnp.zeros((4000, 1)), "cond": {}}, jax.random.key(0)
    )
    assert (batch["tau"] == 1).all() and abs(batch["x_in"].mean()) < 0.1 and abs(batch["x_in"].std() - 1) < 0.05
