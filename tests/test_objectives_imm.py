"""Inductive moment matching: values by hand, the exact map where the pairs lie on it and, for large groups, where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flowjax import exact, objectives, paths, samplers, times
from flowjax.config import ConfigError
from flowjax.objectives import imm
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF, KEY = paths.rectified(), jax.random.key(0)


def std(t):
    return jnp.sqrt((1 - t) ** 2 / 4 + t**2)


def flow_map(std, theta=(0.0, 0.0)):
    """Data N(0, 1/4) whose marginals have the deviation std(t): the map multiplies by std(s) / std(t), plus theta."""

    def apply(x_t, t, cond, key):
        t, step = t[:, None], cond["step"][:, None]
        u = (1 - std(t - step) / std(t)) / jnp.where(step == 0, 1.0, step) * x_t
        return u + theta[0] * x_t + theta[1] * t * step

    return Model(apply, RF, "velocity", step_embed=True)


def given(n=8, coupled=False, **times):
    x, z = (jax.random.normal(k, (n, 1)) for k in jax.random.split(KEY))
    fixed = {"t": 0.7, "r": 0.6, "s": 0.2} | times
    return {"x": x / 2, "z": x if coupled else z, **{k: jnp.full(n, v) for k, v in fixed.items()}, "cond": {}}


def loss(net, batch, key=None, **settings):
    return objectives.build({"name": "inductive_moment_matching", **settings}).players[0].loss({"net": net}, batch, key)


def test_value_by_hand():
    """A map that stays where it is, on the line: y = x_t, y~ = x_r for two particles and two groups of other times."""
    net = Model(lambda x, t, c, k: 0 * x, RF, "velocity", step_embed=True)
    x, z, t, r, s = np.asarray([1.0, -2.0, 0.5, 3.0]), np.asarray([0.5, 1.0, -1.0, 2.0]), [0.8, 0.4], [0.7, 0.3], [0.1, 0.2]
    wanted, raw = [], []
    for g in range(2):
        rows = slice(2 * g, 2 * g + 2)
        y, goal = ((1 - v[g]) * x[rows] + v[g] * z[rows] for v in (t, r))
        k = lambda p, q: np.exp(-np.abs(p[:, None] - q[None]) / (t[g] - s[g]))  # noqa: B023, E731
        raw.append((k(y, y) + k(goal, goal) - 2 * k(y, goal)).mean())
        snr = ((1 - t[g]) / t[g]) ** 2
        omega = 0.5 / (1 + snr / np.exp(1.5)) * 2 / (t[g] * (1 - t[g])) * (1 - t[g]) ** 2 / ((1 - t[g]) ** 2 + t[g] ** 2)
        wanted.append(omega * raw[-1])
    batch = {"x": x[:, None], "z": z[:, None], "cond": {}} | {k: np.repeat(v, 2) for k, v in (("t", t), ("r", r), ("s", s))}
    value, metrics = loss(net, jax.tree.map(jnp.asarray, batch), particles=2, bias=1.5, power=2.0)
    np.testing.assert_allclose(value, np.mean(wanted), rtol=1e-4)  # but for the floor
    np.testing.assert_allclose(metrics["discrepancy"], np.mean(raw), rtol=1e-4)


def test_width_grows_with_the_dimensions():
    """Each distance is divided by dims (t - s): two equal dimensions give sqrt 2 / 2 of the exponent of one."""
    net = Model(lambda x, t, c, k: 0 * x, RF, "velocity", step_embed=True)
    one = given(1)
    two = {**one, "x": jnp.tile(one["x"], 2), "z": jnp.tile(one["z"], 2)}
    a, b = (loss(net, batch, particles=1)[1]["discrepancy"] for batch in (one, two))
    np.testing.assert_allclose(np.log(1 - b / 2) / np.log(1 - a / 2), 2**0.5 / 2, rtol=1e-5)


def test_distances_below_the_floor_count_as_the_floor():
    """One particle that stays where it is, 1/2 apart on both sides, and t - s = 1/2: k(y, y) is exp(-2 floor)."""
    net = Model(lambda x, t, c, k: 0 * x, RF, "velocity", step_embed=True)
    batch = given(1) | {"x": jnp.zeros((1, 1)), "z": jnp.full((1, 1), 5.0)}  # y = 3.5, y~ = 3
    found = [loss(net, batch, particles=1, floor=floor)[1]["discrepancy"] for floor in (0.1, 0.6)]
    np.testing.assert_allclose(found, [2 * np.exp(-0.2) - 2 * np.exp(-1.0), 0], atol=1e-12)


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_cosine"])
def test_weight_is_the_papers(path):
    path = paths.PATHS[path]()
    t = jnp.asarray([0.1, 0.5, 0.9])
    a, b, log_snr = path.a(t), path.b(t), path.log_snr(t)
    for bias, power in ((4.0, 1.0), (0.5, 2.0)):
        papers = 0.5 * jax.nn.sigmoid(bias - log_snr) * -path.dlog_snr(t) * a**power / (a**2 + b**2)
        np.testing.assert_allclose(imm.weighting(path, t, bias, power), papers, rtol=1e-9)
    assert np.isfinite(imm.weighting(RF, jnp.asarray([0.0, 1.0]), 4.0, 1.0)).all()


def test_exact_map_leaves_nothing_where_the_pairs_lie_on_it():
    """Pairs z = 2 x of the flow itself, which is straight: both sides land at the same points, and the loss is 0 with gradient 0."""
    straight = lambda t: (1 - t) / 2 + t  # noqa: E731
    value = lambda theta: loss(flow_map(straight, theta), given(coupled=True))[0]  # noqa: E731
    assert value(jnp.zeros(2)) < 1e-9
    np.testing.assert_allclose(jax.grad(value)(jnp.zeros(2)), 0, atol=1e-9)
    assert np.abs(jax.grad(value)(jnp.asarray([0.1, -0.2]))).min() > 1e-3


def test_exact_map_solves_large_groups_of_independent_pairs():
    """The squared discrepancy of equal distributions is 0; what is left, of i = j and of the draw, is small against the slope nearby."""
    n = 610  # a Fibonacci lattice of as many points is even in both directions
    x, z = (stats.norm.ppf(((k * np.arange(n) + 0.5) / n) % 1)[:, None] for k in (1, 377))
    batch = given(n) | {"x": jnp.asarray(x / 2), "z": jnp.asarray(z)}
    slope = jax.jit(jax.grad(lambda theta: loss(flow_map(std, theta), batch, particles=n)[0]))
    at, off = slope(jnp.zeros(2)), slope(jnp.asarray([0.2, -0.6]))
    assert np.abs(at).max() < 0.05 * np.abs(off).min()


def test_no_gradient_through_the_goal():
    """y~ is a constant: moving y alone and moving both have the same gradient where only y counts."""
    batch, h = given(4), 1e-6
    net = lambda a, b: Model(lambda x, t, c, k: jnp.where(t[:, None] == 0.7, a, b) * x, RF, "velocity", step_embed=True)  # noqa: E731
    value = lambda a, b: loss(net(a, b), batch)[0]  # noqa: E731
    slope = jax.grad(lambda a: value(a, a))(0.3)
    np.testing.assert_allclose(slope, (value(0.3 + h, 0.3) - value(0.3 - h, 0.3)) / (2 * h), rtol=1e-6)
    assert abs(value(0.3, 0.3 + h) - value(0.3, 0.3 - h)) > 1e-9


def test_dropout_is_shared_by_both_sides():
    net = Model(lambda x, t, c, key: x * jax.random.bernoulli(key, 0.5, x.shape), RF, "velocity", step_embed=True)
    same = given(8, r=0.7)
    assert loss(net, same, jax.random.key(3))[0] == 0
    one, two = (loss(net, given(8), jax.random.key(i))[0] for i in range(2))
    assert one != two


def test_by_label_compares_rows_of_one_label():
    """With one label all counts; with a label each, only i = j is left."""
    net, batch = flow_map(std, (0.2, 0.1)), given(4)
    plain = loss(net, batch)[1]["discrepancy"]
    for label, wanted in ((jnp.zeros(4, int), plain), (jnp.arange(4), None)):
        found = loss(net, {**batch, "cond": {"label": label}}, by_label=True)[1]["discrepancy"]
        if wanted is None:
            rows = [jax.tree.map(lambda v, i=i: v[i : i + 1], batch) for i in range(4)]
            wanted = sum(loss(net, row, particles=1)[1]["discrepancy"] for row in rows) / 16
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_by_label_groups_rows_of_one_label():
    """Of 400 rows of 10 labels, at most one group in each change of label is mixed; rows keep what belongs to them."""
    label = jax.random.randint(KEY, (400,), 0, 10)
    batch = {"x": label[:, None] + jnp.arange(400)[:, None] / 1000, "cond": {"label": label}, "step": jnp.zeros((), int)}  # as the train step adds it
    out = rolled(batch=batch, by_label=True)
    np.testing.assert_array_equal(jnp.floor(out["x"][:, 0]), out["cond"]["label"])
    np.testing.assert_array_equal(jnp.sort(out["x"], axis=0), jnp.sort(batch["x"], axis=0))
    groups = np.asarray(out["cond"]["label"]).reshape(-1, 4)
    assert (groups != groups[:, :1]).any(1).sum() <= 9
    np.testing.assert_array_equal(rolled(batch=batch)["x"], batch["x"])
    with pytest.raises(ConfigError, match="objective.by_label needs data with labels"):
        rolled(batch={"x": batch["x"], "cond": {}}, by_label=True)


def rolled(n=400, path=RF, null=None, batch=None, **settings):
    bound = objectives.build({"name": "inductive_moment_matching", **settings})
    net = Model(None, path, "velocity", null, step_embed=True)
    batch = batch or {"x": jnp.zeros((n, 1)), "cond": {"label": jnp.zeros(n, int)}}
    return bound.rollout({"net": net}, batch, KEY)


def test_groups_share_their_times():
    out = rolled(particles=8)
    t, r, s = (np.asarray(out[k]).reshape(-1, 8) for k in ("t", "r", "s"))
    for v in (t, r, s):
        assert (v == v[:, :1]).all()
    assert len(np.unique(t)) == 50 and abs(out["z"].std() - 1) < 0.1 and len(np.unique(out["z"])) == 400
    assert (t >= r).all() and (r >= s).all() and s.min() >= 0.001 and t.max() <= 0.994
    many = rolled(40_000, particles=2)
    assert abs(many["t"].mean() - 0.4975) < 0.005 and abs(many["s"].mean() - 0.249) < 0.005
    alone, plain = rolled(particles=1), rolled(time={"name": "uniform", "t_min": 0.001, "t_max": 0.994})
    assert len(np.unique(alone["t"])) == 400
    for k in ("t", "r", "s"):
        np.testing.assert_array_equal(plain[k], rolled()[k])
    late = rolled(particles=2, time={"name": "uniform", "t_min": 0.5, "t_max": 0.75})
    assert (late["s"] <= late["t"]).all() and late["s"].min() >= 0.5 and 0.74 < late["t"].max() <= 0.75


@pytest.mark.parametrize("path", [RF, paths.trigonometric()])
def test_r_is_a_gap_of_noise_below_t(path):
    out = rolled(path=path, gap=0.1)
    t, r, s = (np.asarray(path.sigma(out[k].astype(float))) for k in ("t", "r", "s"))
    np.testing.assert_allclose(r, np.maximum(t - 0.1, s), rtol=2e-4)
    assert (r > s * 1.001).any() and (np.abs(r - s) < 1e-4 * s).any()


def test_labels_are_dropped():
    null = lambda cond: {"label": jnp.full_like(cond["label"], 7)}  # noqa: E731
    assert abs((np.asarray(rolled(2000, null=null, label_drop=0.25)["cond"]["label"]) == 7).mean() - 0.25) < 0.04
    assert (np.asarray(rolled(null=null)["cond"]["label"]) == 0).all()


def test_sampler_takes_the_maps_own_steps():
    z = jax.random.normal(KEY, (16, 1))
    for n in (1, 3):
        np.testing.assert_allclose(samplers.sample(flow_map(std), z, KEY, times.grid(n, RF), "flow_map"), z / 2, rtol=1e-6)


def test_defaults():
    out = rolled(8000)
    assert len(np.unique(out["t"])) == 2000 and float(out["t"].max()) > 0.99
    t, r, s = (np.asarray(RF.sigma(out[k].astype(float))) for k in ("t", "r", "s"))
    np.testing.assert_allclose(r, np.maximum(t - 0.04, s), rtol=2e-4)
    net, batch = flow_map(std, (0.2, 0.1)), given(8)
    assert loss(net, batch)[0] == loss(net, batch, particles=4, bias=4.0, power=1.0, floor=1e-6)[0]
    assert loss(net, batch)[0] != loss(net, batch, particles=8)[0]


def test_refusals():
    for settings, words in (
        ({"particles": 3}, "objective.particles = 3 should divide the batch's 400 rows"), ({"particles": 0}, "objective.particles = 0"),
        ({"gap": 0.0}, "objective.gap = 0.0 should be positive"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            rolled(**settings)
    with pytest.raises(ConfigError, match="objective.power = 0.5 should be at least 1"):
        loss(flow_map(std), given(), power=0.5)
    with pytest.raises(ConfigError, match="model.step_embed = True"):
        bound = objectives.build("inductive_moment_matching")
        bound.rollout({"net": exact.gaussian([0.0], 1.0).model(RF)}, {"x": jnp.zeros((4, 1)), "cond": {}}, KEY)
    assert objectives.OBJECTIVES["inductive_moment_matching"].whole
