"""Consistency distillation and training against the linear flow of Gaussian data, where every student is a table of factors."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax import exact, objectives
from flowjax.config import ConfigError
from flowjax.objectives import consistency
from flowjax.paths import PATHS, edm, rectified, trigonometric, vp_linear
from flowjax.predictions import Model
from flowjax.times import grid

RF = rectified()
DATA = exact.gaussian([0.0], 0.25)
KEY = jax.random.key(0)


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def factors(c, times, path=RF):
    """The student f(x, times[i]) = c[i] x, times ascending and c[0] = 1, as a velocity network."""

    def apply(x_t, t, cond, key):
        nearest = jnp.argmin(jnp.abs(t[:, None] - times), axis=1)
        # f = (b' x_t - b v) / W for the row (a', b') of v and W = a b' - a' b; at t = 0 every v gives f = x.
        v = (path.db(t) - path.wronskian(t) * c[nearest]) / jnp.where(t > 0, path.b(t), jnp.inf)
        return v[:, None] * x_t

    return Model(apply, path, "velocity")


def moments(times, variance=0.25):
    """Every interval of the grid with points whose moments up to the third are those of x ~ N(0, variance) and z ~ N(0, 1)."""
    x, z = (v.reshape(-1, 1) for v in np.meshgrid([-np.sqrt(variance), np.sqrt(variance)], [-1.0, 1.0]))
    n = len(times) - 1
    return {
        "x": jnp.tile(x, (n, 1)),
        "z": jnp.tile(z, (n, 1)),
        "t": jnp.repeat(jnp.asarray(times[1:]), 4),
        "s": jnp.repeat(jnp.asarray(times[:-1]), 4),
        "cond": {},
    }


def gradient(loss, times, path=RF, **settings):
    """(c, factors of the target) -> d loss / d c of the student's factors, jitted; the teacher is exact."""
    times = jnp.asarray(times)

    def value(c, target):
        nets = {"net": factors(c, times, path), "target": factors(target, times, path), "teacher": DATA.model(path)}
        return loss(nets, moments(times), None, **settings)[0]

    return jax.jit(jax.grad(value))


def fixed_point(loss, times, path=RF, **settings):
    """f(x, t_N) / x at the student that is its own target: the loss is quadratic in each factor, so a Newton step per interval."""
    slope, n = gradient(loss, times, path, **settings), len(times) - 1
    second_moment = np.asarray(path.a(jnp.asarray(times)) ** 2 / 4 + path.b(jnp.asarray(times)) ** 2)
    c = np.ones(n + 1)
    for i in range(1, n + 1):
        c[i] -= slope(c, c)[i] * n / (2 * second_moment[i])
    assert (np.abs(slope(c, c)[1:]) < 1e-12 * second_moment[1:]).all()
    off = c + 0.05 * (-1) ** np.arange(n + 1)
    assert (np.abs(slope(off, off)[1:]) > 0.05 / n * second_moment[1:]).all()
    return c[-1]


EULER = {2: 0.2, 4: 0.34054, 8: 0.41478, 16: 0.45568}  # the N-step Euler product of data with variance 1/4; exact: 0.5
HEUN = {2: 0.48, 4: 0.50483, 8: 0.50244, 16: 0.50076}


@pytest.mark.parametrize("n", EULER)
def test_fixed_point_is_the_product_of_the_solvers_steps(double_precision, n):
    times = np.arange(n + 1) / n
    assert fixed_point(consistency.training_loss, times) == pytest.approx(EULER[n], abs=6e-6)
    assert fixed_point(consistency.distillation_loss, times, solver="euler") == pytest.approx(EULER[n], abs=6e-6)
    assert fixed_point(consistency.distillation_loss, times) == pytest.approx(HEUN[n], abs=6e-6)


@pytest.mark.parametrize(("n", "std"), [(18, 0.42305), (40, 0.46487)])
def test_training_on_edms_noise_levels_loses_the_known_part_of_the_variance(double_precision, n, std):
    """The output's standard deviation at sigma = 80 after n levels from 80 to 0.002, where f = x; the data's is 0.5."""
    path = edm()
    times = grid(n - 1, path, "karras", t_end=0.002 / 80)[::-1]
    c = fixed_point(consistency.training_loss, times, path)
    assert c * np.sqrt(0.25 + 80**2) == pytest.approx(std, abs=6e-6)


def test_training_and_euler_distillation_have_the_same_expected_gradient(double_precision):
    """At any parameters, not only at the fixed point, and with any target."""
    times = jnp.asarray([0.0, 0.2, 0.5, 0.6, 1.0])
    c, target = jnp.asarray([1.0, 0.7, -0.3, 0.4, 1.1]), jnp.asarray([1.0, -0.2, 0.5, 0.9, 0.3])
    trained = gradient(consistency.training_loss, times)(c, target)
    distilled = gradient(consistency.distillation_loss, times, solver="euler")(c, target)
    np.testing.assert_allclose(trained, distilled, rtol=1e-12)
    assert np.abs(trained[1:]).min() > 1e-3
    assert np.abs(trained - gradient(consistency.distillation_loss, times, solver="heun")(c, target)).max() > 1e-3


def test_no_gradient_reaches_target_or_teacher(double_precision):
    times = jnp.asarray([0.0, 0.5, 1.0])
    c = jnp.asarray([1.0, 0.7, 0.4])

    def loss(net, target, teacher):
        nets = {"net": factors(net, times), "target": factors(target, times), "teacher": factors(teacher, times)}
        return consistency.distillation_loss(nets, moments(times), None)[0]

    of_net, of_target, of_teacher = jax.grad(loss, argnums=(0, 1, 2))(c, c + 0.1, c - 0.1)
    assert np.abs(of_net).max() > 1e-2
    assert not np.any(of_target) and not np.any(of_teacher)


@pytest.mark.parametrize("path", [name for name in PATHS if name != "ve"])
@pytest.mark.parametrize("prediction", ["velocity", "v", "edm", "eps"])
def test_boundary_holds_for_every_network(path, prediction):
    path = PATHS[path]()
    x, y = jax.random.normal(KEY, (2, 64, 3))
    net = Model(lambda x_t, t, cond, key: y, path, prediction)
    consistency.boundary(net)
    if path.t_min == 0 or prediction != "velocity":
        np.testing.assert_array_equal(net.get("x", x, 0.0), x)
    # Off by b(t_min) |y| at the end of a vp grid.
    at_end = jnp.abs(net.get("x", x, path.t_min) - x)
    assert (at_end <= 1.1 * path.b(path.t_min) * (jnp.abs(y) + 0.1 * jnp.abs(x))).all()


@pytest.mark.parametrize(("path", "prediction"), [("rectified", "score"), ("edm", "score"), ("ve", "velocity"), ("ve", "eps"), ("ve", "x")])
def test_parameterisations_without_the_boundary_are_refused(path, prediction):
    net = DATA.model(PATHS[path](), prediction)
    with pytest.raises(ConfigError, match=rf"need f\(x, 0\) = x, which prediction '{prediction}' on path '{path}' does not"):
        consistency.rollout({"net": net}, {"x": jnp.zeros((2, 1)), "step": 0}, KEY)


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_linear", "edm"])
def test_predictions_of_the_image_answer_with_their_input_at_the_data(double_precision, path):
    """A network of x knows no boundary: at the end of the grid the goal is x_s itself and not what the target says, elsewhere that."""
    path = PATHS[path]()
    says = lambda value: Model(lambda x_t, t, cond, key: jnp.full_like(x_t, value), path, "x")  # noqa: E731
    x, z = jax.random.normal(KEY, (2, 2, 1))
    batch = {"x": x, "z": z, "t": jnp.full(2, 0.5), "s": jnp.asarray([path.t_min, 0.25]), "cond": {}}
    assert (consistency.rollout({"net": says(3.0)}, {"x": x, "step": 0}, KEY)["t"] > path.t_min).all()
    with pytest.raises(ConfigError, match="objective.grid.t_end = 0.1: a network that predicts x"):
        consistency.rollout({"net": says(3.0)}, {"x": x, "step": 0}, KEY, grid={"name": "uniform", "t_end": 0.1})
    value, _ = consistency.training_loss({"net": says(3.0), "target": says(7.0)}, batch, None)
    end = float(path.perturb(x, z, path.t_min)[0, 0])
    assert float(value) == pytest.approx(((3 - end) ** 2 + (3 - 7) ** 2) / 2, rel=1e-12)


def test_dropout_is_shared_between_net_and_target():
    def apply(x_t, t, cond, key):
        return x_t * jax.random.bernoulli(key, 0.5, x_t.shape)

    net = Model(apply, RF, "velocity")
    x, z = jax.random.normal(KEY, (2, 64, 2))
    t = jnp.full(64, 0.5)
    batch = {"x": x, "z": z, "t": t, "s": t, "cond": {}}  # s = t: equal networks at equal inputs
    assert consistency.training_loss({"net": net, "target": net}, batch, KEY)[0] == 0
    apart = {**batch, "s": t - 0.1}
    assert consistency.training_loss({"net": net, "target": net}, apart, KEY)[0] > 0.01
    # The masks do depend on the key.
    other = consistency.training_loss({"net": net, "target": net}, apart, jax.random.key(1))[0]
    assert other != consistency.training_loss({"net": net, "target": net}, apart, KEY)[0]


def test_the_condition_reaches_all_three_networks(double_precision):
    def labelled(scale):
        return Model(lambda x_t, t, cond, key: scale * cond["label"][:, None] + 0 * x_t, RF, "velocity")

    nets = {"net": labelled(1.0), "target": labelled(10.0), "teacher": labelled(100.0)}
    batch = {
        "x": jnp.zeros((1, 1)), "z": jnp.zeros((1, 1)), "t": jnp.asarray([0.5]), "s": jnp.asarray([0.25]),
        "cond": {"label": jnp.asarray([3.0])},
    }
    # f = -0.5 * 3; x_s = -0.25 * 300; goal = x_s - 0.25 * 30.
    for solver in ("euler", "heun"):
        value, metrics = consistency.distillation_loss(nets, batch, None, solver=solver)
        assert float(value) == pytest.approx((-1.5 + 75 + 7.5) ** 2) == float(metrics["distance"])
    assert float(consistency.training_loss(nets, batch, None)[0]) == pytest.approx((-1.5 + 7.5) ** 2)


# Guidance inside the teacher.


def test_teacher_is_guided(double_precision):
    """Classes N(1, 1/4) and a null class N(0, 1): at t = 0.5, x = 0.4 the velocities are -1.12 and 0, hence -1.12 w guided."""

    def apply(x_t, t, cond, key):
        conditional = exact.gaussian([1.0], 0.25).velocity(RF, x_t, t)
        return jnp.where(cond["label"][:, None] == 0, conditional, exact.gaussian([0.0], 1.0).velocity(RF, x_t, t))

    teacher = Model(apply, RF, "velocity", null=lambda cond: {"label": jnp.ones_like(cond["label"])})
    zero = Model(lambda x_t, t, cond, key: x_t / jnp.where(t > 0.3, t, jnp.inf)[:, None], RF, "velocity")  # f(., t) = 0, f(x, s) = x
    batch = {
        "x": jnp.asarray([[0.4]] * 2), "z": jnp.asarray([[0.4]] * 2), "t": jnp.asarray([0.5] * 2), "s": jnp.asarray([0.25] * 2),
        "cond": {"label": jnp.zeros(2, int)},
    }
    nets = {"net": zero, "target": zero, "teacher": teacher}
    for guidance, w in (("none", 1), ({"name": "cfg", "scale": 3.0}, 3)):
        value = consistency.distillation_loss(nets, batch, None, solver="euler", guidance=guidance)[0]
        assert float(value) == pytest.approx((0.4 + 0.25 * 1.12 * w) ** 2, rel=1e-9)


@pytest.mark.parametrize("teacher", [vp_linear(), vp_linear(0.2)])
def test_teacher_must_run_on_the_students_path(teacher):
    net = DATA.model(vp_linear() if teacher != vp_linear() else RF)
    nets = {"net": net, "target": net, "teacher": DATA.model(teacher)}
    with pytest.raises(ConfigError, match=r"roles.teacher was trained with another path than the config's: \('vp_linear'"):
        consistency.distillation_loss(nets, moments([0.0, 0.5, 1.0]), None)


def test_teacher_of_another_prediction_gives_the_same_loss(double_precision):
    times = np.asarray([0.0, 0.25, 0.5, 0.9])
    student = factors(jnp.asarray([1.0, 0.8, 0.5, 0.3]), times)
    values = []
    for prediction in ("velocity", "eps", "v"):
        nets = {"net": student, "target": student, "teacher": DATA.model(RF, prediction)}
        values.append(float(consistency.distillation_loss(nets, moments(times), None)[0]))
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


def test_heun_falls_back_to_euler_where_the_teacher_is_undetermined(double_precision):
    """An x-predicting teacher has no velocity at t = 0."""
    x_t, t = jnp.asarray([[0.4], [0.4]]), jnp.asarray([0.5, 0.5])
    s = jnp.asarray([0.0, 0.25])
    by_x = consistency.ode_step(DATA.model(RF, "x"), x_t, t, s, "heun")
    euler = consistency.ode_step(DATA.model(RF), x_t, t, s, "euler")
    heun = consistency.ode_step(DATA.model(RF), x_t, t, s, "heun")
    np.testing.assert_allclose(by_x[0], euler[0], rtol=1e-9)
    np.testing.assert_allclose(by_x[1], heun[1], rtol=1e-9)
    assert abs(heun[1, 0] - euler[1, 0]) > 1e-3 < abs(heun[0, 0] - euler[0, 0])


# Grids and intervals.


def pairs(net=DATA.model(RF), n=40_000, step=0, key=KEY, **settings):
    batch = consistency.rollout({"net": net}, {"x": jnp.zeros((n, 1)), "cond": {}, "step": jnp.asarray(step)}, key, **settings)
    return np.asarray(batch["t"]), np.asarray(batch["s"]), batch


def counts_on(times, t, s):
    """How often each interval of the ascending grid was drawn; every pair must be one of them."""
    i = np.abs(s[:, None] - times[None, :-1]).argmin(axis=1)
    np.testing.assert_allclose(s, times[i], atol=1e-7)
    np.testing.assert_allclose(t, times[i + 1], atol=1e-7)
    return np.bincount(i, minlength=len(times) - 1)


@pytest.mark.parametrize(
    ("path", "settings"),
    [(RF, "uniform"), (RF, {"name": "cosine", "shift": 3.0}), (edm(), "karras"), (trigonometric(), {"name": "uniform", "t_end": 0.1})],
)
def test_pairs_are_adjacent_and_every_interval_is_equally_likely(path, settings):
    t, s, batch = pairs(DATA.model(path), steps=6, grid=settings)
    name = {"name": settings} if isinstance(settings, str) else settings
    drawn = counts_on(grid(6, path, **name)[::-1], t, s)
    assert stats.chisquare(drawn).pvalue > 1e-3
    assert batch["z"].shape == (40_000, 1) and stats.kstest(np.ravel(batch["z"]), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(t, batch["z"][:, 0])[0, 1]) < 0.02


def test_default_grid_has_the_papers_eighteen_steps():
    t, s, _ = pairs(n=4000)
    assert len(np.unique(t)) == 18 and t.max() == 1 and s.min() == 0


def test_grid_starts_where_student_and_teacher_are_determined():
    eps, velocity = DATA.model(RF, "eps"), DATA.model(RF)
    for nets in ({"net": eps}, {"net": eps, "teacher": velocity}, {"net": velocity, "teacher": eps}):
        out = consistency.rollout(nets, {"x": jnp.zeros((500, 1)), "step": 0}, KEY, steps=2)
        assert float(out["t"].max()) == pytest.approx(1000 / 1001)


# log-normal sigma of mean -1.1 and deviation 2 over the ten intervals between EDM's eleven noise levels (2310.14189 sec. 3.4).
ICT = [0.0626, 0.1817, 0.2455, 0.2135, 0.1424, 0.0806, 0.0411, 0.0196, 0.0089, 0.0040]


def test_intervals_follow_icts_lognormal():
    path = edm()
    settings = {"name": "karras", "t_end": 0.002 / 80}
    law = {"name": "edm_lognormal", "p_mean": -1.1, "p_std": 2.0}
    t, s, _ = pairs(DATA.model(path, "edm"), 100_000, steps=10, grid=settings, time=law)
    drawn = counts_on(grid(10, path, **settings)[::-1], t, s)
    assert stats.chisquare(drawn, np.asarray(ICT) / sum(ICT) * drawn.sum()).pvalue > 1e-3
    # Independently of the table: the normal distribution function at the log noise levels.
    levels = np.log(80 * grid(10, path, **settings)[::-1])
    p = np.diff(stats.norm.cdf(levels, -1.1, 2.0))
    assert stats.chisquare(drawn, p / p.sum() * drawn.sum()).pvalue > 1e-3
    np.testing.assert_allclose(p / p.sum(), ICT, atol=6e-5)


def test_uniform_times_make_intervals_as_likely_as_they_are_long():
    t, s, _ = pairs(steps=4, grid={"name": "uniform", "shift": 3.0}, time="uniform")
    times = grid(4, RF, shift=3.0)[::-1]
    assert stats.chisquare(counts_on(times, t, s), np.diff(times) * 40_000).pvalue > 1e-3


def test_refined_rows_of_a_schedule_follow_the_law_too():
    settings = {"steps": 2, "schedule": "doubling", "steps_max": 8, "total_steps": 3, "time": "uniform"}
    for step, n in ((0, 2), (1, 4), (2, 8)):
        t, s, _ = pairs(step=step, **settings)
        assert stats.chisquare(counts_on(np.arange(n + 1) / n, t, s)).pvalue > 1e-3


@pytest.mark.parametrize(("step", "n"), [(0, 10), (49_999, 10), (50_000, 20), (149_999, 40), (350_000, 1280), (399_999, 1280), (500_000, 1280)])
def test_ict_doubles_the_intervals(step, n):
    """N = 11, 21, 41, ..., 1281 points, K' = 50,000 for K = 400,000."""
    counts, stage = consistency.interval_counts("doubling", 10, 1280, 400_000)
    assert counts == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert counts[stage(jnp.asarray(step))] == n


def test_doubling_reaches_a_maximum_that_is_no_power_of_two_times_the_start():
    """K' = floor(K / (log2 floor(35/10) + 1)) = floor(100 / 2.585) = 38."""
    counts, stage = consistency.interval_counts("doubling", 10, 35, 100)
    assert counts == [10, 20, 35]
    assert [int(stage(k)) for k in (0, 37, 38, 75, 76, 99)] == [0, 0, 1, 1, 2, 2]
    assert consistency.interval_counts("doubling", 10, 10, 100)[0] == [10]
    counts, stage = consistency.interval_counts("doubling", 1, 8, 2)  # more stages than steps
    assert [int(stage(k)) for k in (0, 1, 9)] == [0, 1, 3]


def test_ct_schedule_follows_the_paper():
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 points with s0 = 2, s1 = 150; N - 1 intervals."""
    counts, stage = consistency.interval_counts("ct", 1, 150, 800_000)
    for k in (0, 1, 12_345, 400_000, 799_999, 800_000):
        points = np.ceil(np.sqrt(k / 800_000 * (151**2 - 4) + 4) - 1) + 1
        assert counts[stage(jnp.asarray(k))] == points - 1
    assert [counts[stage(k)] for k in (0, 800_000, 10**6)] == [1, 150, 150]
    counts, stage = consistency.interval_counts("ct", 3, 20, 10)
    # sqrt(k/10 (21^2 - 4^2) + 4^2) - 1 = 3, 6.65, 9.05, 18.96, 20
    assert [counts[stage(k)] for k in (0, 1, 2, 9, 10)] == [3, 7, 10, 19, 20]
    assert consistency.interval_counts("ct", 3, 3, 1)[0] == [3]
    t, s, _ = pairs(step=5, n=2000, steps=1, schedule="ct", steps_max=5, total_steps=10)
    # sqrt(0.5 (36 - 4) + 4) - 1 = 3.47, hence 4 intervals.
    counts_on(np.arange(5) / 4, t, s)
    assert len(np.unique(t)) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "cosine"}, "objective.schedule = 'cosine' is unknown; valid: constant, ct, doubling"),
        ({"schedule": "ct", "steps_max": 50}, "needs steps_max >= steps and total_steps .*total_steps = 0"),
        ({"schedule": "doubling", "steps_max": 17, "total_steps": 9}, "steps = 18, steps_max = 17"),
        ({"time": {"name": "intervals", "shift": 2.0}}, "objective.time.shift is unknown"),
        ({"time": {"name": "logit_normal", "middle": 2.0}}, "middle is unknown for logit_normal; valid: mean, std"),
        ({"grid": "exponential"}, "exponential"),
    ],
)
def test_bad_rollouts_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        pairs(n=2, **settings)


# Distance and weight.


def test_l2_is_the_mean_of_squares():
    f = jnp.asarray([[[3.0, 1.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    np.testing.assert_allclose(consistency.distance(f, jnp.ones_like(f), "l2", 9.0), [(4 + 0 + 1 + 1) / 4, 0.0])


def test_pseudo_huber_values_and_limits(double_precision):
    # |u| = 4 and c = 3: sqrt(16 + 9) - 3.
    u = jnp.asarray([[4.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(consistency.distance(u + 1, jnp.ones((2, 2)), "pseudo_huber", 3 / np.sqrt(2)), [2.0, 0.0], atol=1e-12)

    def gradient(u):
        return np.asarray(jax.grad(lambda u: jnp.sum(consistency.distance(u, jnp.zeros_like(u), "pseudo_huber", 0.1)))(u))

    # c = 0.1 sqrt(4): u / |u| far away, u / c close by.
    far, near = jnp.asarray([[30.0, 40.0, 0.0, 0.0]]), jnp.asarray([[3e-5, 4e-5, 0.0, 0.0]])
    np.testing.assert_allclose(gradient(far), far / 50, rtol=1e-4)
    np.testing.assert_allclose(gradient(near), near / 0.2, rtol=1e-4)


@pytest.mark.parametrize("loss", [consistency.training_loss, consistency.distillation_loss])
def test_default_huber_constant_is_icts(loss):
    """0.00054 sqrt(D): 0.02993 for CIFAR-10. At |u| = c the distance is (sqrt 2 - 1) c."""
    huber = inspect.signature(loss).parameters["huber"].default
    u = jnp.zeros((1, 3072)).at[0, 7].set(0.02993)
    assert float(consistency.distance(u, 0 * u, "pseudo_huber", huber)[0]) == pytest.approx((2**0.5 - 1) * 0.02993, rel=1e-3)


def test_metric_and_weighting_reach_the_loss(double_precision):
    path = edm()
    zero = Model(lambda x_t, t, cond, key: 0 * x_t, path, "velocity")  # f = x_t
    batch = {"x": jnp.zeros((2, 4)), "z": jnp.ones((2, 4)), "t": jnp.asarray([0.5, 0.25]), "s": jnp.asarray([0.25, 0.125]), "cond": {}}
    nets = {"net": zero, "target": zero, "teacher": zero}
    # f - goal = sigma_t - sigma_s = 20 and 10 in each of four dimensions.
    value, metrics = consistency.training_loss(nets, batch, None)
    assert float(value) == pytest.approx((400 + 100) / 2) == float(metrics["distance"])
    value, metrics = consistency.training_loss(nets, batch, None, weighting="inverse_gap")
    assert float(value) == pytest.approx((400 / 20 + 100 / 10) / 2) and float(metrics["distance"]) == pytest.approx(250)
    value, _ = consistency.training_loss(nets, batch, None, metric="pseudo_huber", huber=7.5)  # c = 15
    assert float(value) == pytest.approx((np.sqrt(1600 + 225) - 15 + np.sqrt(400 + 225) - 15) / 2)
    # The zero velocity of the teacher leaves x_t where it is, so that f and goal agree.
    for weighting, metric in (("none", "l2"), ("inverse_gap", "pseudo_huber")):
        assert consistency.distillation_loss(nets, batch, None, weighting=weighting, metric=metric)[0] == 0


def test_gap_from_pure_noise_is_finite(double_precision):
    t, s = jnp.asarray([1.0, 1.0, 0.75, 0.5]), jnp.asarray([0.8, 0.0, 0.5, 0.0])
    # sigma = t / (1 - t): from infinity to 4 counts as 4, from infinity to 0 as 1; then 3 - 1 and 1 - 0.
    np.testing.assert_allclose(consistency.inverse_gap(RF, t, s), [1 / 4, 1.0, 1 / 2, 1.0], rtol=1e-12)
    fine = grid(5000, RF)
    weight = consistency.inverse_gap(RF, jnp.asarray(fine[:-1]), jnp.asarray(fine[1:]))
    assert np.isfinite(weight).all() and weight.max() < 5001


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "rk4"}, "objective.solver = 'rk4' is unknown; valid: euler, heun"),
        ({"metric": "l1"}, "objective.metric = 'l1' is unknown; valid: l2, pseudo_huber"),
        ({"weighting": "karras"}, "objective.weighting = 'karras' is unknown; valid: none, inverse_gap"),
        ({"guidance": {"name": "cgf"}}, "objective.guidance.name = 'cgf' is unknown"),
    ],
)
def test_bad_losses_are_refused(settings, words):
    net = DATA.model(RF)
    with pytest.raises(ConfigError, match=words):
        consistency.distillation_loss({"net": net, "target": net, "teacher": net}, moments([0.0, 0.5, 1.0]), None, **settings)


def test_target_is_an_average_of_the_trained_network():
    for name in ("consistency_distillation", "consistency_training"):
        assert objectives.OBJECTIVES[name].roles["target"] == "ema:net"
