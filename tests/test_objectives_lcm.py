"""Latent consistency distillation: the authors' boundary scalings, guided targets by hand, intervals that skip, the scale as an input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import exact, objectives, paths, samplers, times
from flowjax.config import ConfigError
from flowjax.objectives import lcm
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF, KEY = paths.rectified(), jax.random.key(0)


def labelled(with_, without, prediction="velocity", path=RF):
    """with_(x_t, t) for label 0, without(x_t, t) for none."""

    def apply(x_t, t, cond, key):
        return jnp.where(cond["label"][:, None] == 0, with_(x_t, t[:, None]), without(x_t, t[:, None]))

    return Model(apply, path, prediction, lambda cond: {**cond, "label": jnp.ones_like(cond["label"])})


def student(fn, prediction="velocity", path=RF):
    return Model(lambda x_t, t, cond, key: fn(x_t, t[:, None], cond["guidance"][:, None]), path, prediction, guidance_embed=True)


def loss(nets, batch, **settings):
    return objectives.build({"name": "latent_consistency", **settings}).players[0].loss(nets, batch, None)


def draw(net, teacher=None, n=4000, **settings):
    bound = objectives.build({"name": "latent_consistency", **settings})
    return bound.rollout({"net": net, "teacher": teacher or labelled(jnp.add, jnp.add)}, {"x": jnp.zeros((n, 1)), "cond": {}}, KEY)


def test_scalings_are_the_authors():
    """(1, 0) at the data; at their step 19, where k t = 190: c_skip = 0.25 / (190^2 + 0.25), c_out = 190 / sqrt(190^2 + 0.25)."""
    skip, out = lcm.scalings(jnp.asarray([0.0, 0.019, 5e-5]), 10_000.0)
    np.testing.assert_allclose(skip, [1, 6.92516e-6, 0.5], rtol=1e-6)
    np.testing.assert_allclose(out, [0, 0.99999654, 0.5**0.5], rtol=1e-8)


@pytest.mark.parametrize("prediction", ["velocity", "x", "eps"])
def test_boundary(prediction):
    """At s = 0 the target answers with its input, whatever the network says: the loss is the distance of f(x_t) from x_s."""
    teacher = labelled(lambda x, t: 1 + 0 * x, lambda x, t: 1 + 0 * x)
    nets = {"net": student(lambda x, t, w: 0 * x, "x"), "target": student(lambda x, t, w: 7 + x, prediction), "teacher": teacher}
    x = jnp.asarray([[0.4], [-1.0]])
    batch = {"x": x, "z": x, "t": jnp.full(2, 0.5), "s": jnp.zeros(2), "cond": {"label": jnp.zeros(2, int), "guidance": jnp.full(2, 2.0)}}
    c_skip = 0.25 / (2**2 + 0.25)
    expected = jnp.mean((c_skip * x - (x - 0.5)) ** 2)  # velocity 1, from t = 1/2 to 0
    np.testing.assert_allclose(loss(nets, batch, timestep_scaling=4.0)[0], expected, rtol=1e-9)


def test_targets_are_guided_by_each_examples_scale():
    """Classes N(1, 1/4) and without label N(0, 1): at t = 0.5, x = 0.4 the velocities are -1.12 and 0, hence -1.12 w."""
    velocity = lambda mean, variance: lambda x, t: exact.gaussian([mean], variance).velocity(RF, x, t[:, 0])  # noqa: E731
    teacher = labelled(velocity(1.0, 0.25), velocity(0.0, 1.0))
    still = student(lambda x, t, w: 0 * x)  # f = x_t
    w = jnp.asarray([1.0, 3.0, 0.0])
    batch = {
        "x": jnp.full((3, 1), 0.4), "z": jnp.full((3, 1), 0.4), "t": jnp.full(3, 0.5), "s": jnp.full(3, 0.25),
        "cond": {"label": jnp.zeros(3, int), "guidance": w},
    }  # fmt: skip
    nets = {"net": still, "target": still, "teacher": teacher}
    for solver in ("ddim", "euler"):  # which agree on the rectified path
        value, metrics = loss(nets, batch, timestep_scaling=0.0, solver=solver)
        np.testing.assert_allclose(value, np.mean((0.25 * 1.12 * np.asarray(w)) ** 2), rtol=1e-7)
        assert value == metrics["distance"]
    assert abs(loss(nets, batch, timestep_scaling=0.0, solver="heun")[0] - value) > 1e-3
    huber = loss(nets, batch, timestep_scaling=0.0, metric="pseudo_huber", huber=0.5)[0]
    np.testing.assert_allclose(huber, np.mean(np.sqrt((0.28 * np.asarray(w)) ** 2 + 0.25) - 0.5))
    # The same velocities with the label and without: every scale has the same target.
    same = labelled(lambda x, t: 1 + 0 * x, lambda x, t: 1 + 0 * x)
    np.testing.assert_allclose(loss({**nets, "teacher": same}, batch, timestep_scaling=0.0)[0], 0.25**2)


def test_step_of_the_solver_is_the_samplers():
    path = paths.vp_cosine()
    data = exact.mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])
    x_t = jnp.asarray([[0.8], [-0.3]])
    from flowjax.objectives.consistency import ode_step

    for name in ("ddim", "euler", "heun"):
        ours = ode_step(data.model(path), x_t, jnp.full(2, 0.7), jnp.full(2, 0.4), name)
        np.testing.assert_allclose(ours, samplers.sample(data.model(path), x_t, KEY, [0.7, 0.4], name), rtol=1e-9)


def test_student_and_target_see_the_scale_and_the_gradient_stops():
    teacher = labelled(lambda x, t: 0 * x, lambda x, t: 0 * x)
    batch = {
        "x": jnp.zeros((2, 1)), "z": jnp.ones((2, 1)), "t": jnp.full(2, 0.5), "s": jnp.full(2, 0.25),
        "cond": {"label": jnp.zeros(2, int), "guidance": jnp.asarray([1.0, 2.0])},
    }  # fmt: skip

    def value(k):
        nets = {"net": student(lambda x, t, w: k[0] * w), "target": student(lambda x, t, w: k[1] * w), "teacher": teacher}
        return loss(nets, batch, timestep_scaling=0.0)[0]

    k = jnp.asarray([0.3, -0.2])
    # f - goal = (1/2 - k_0 w / 2) - (1/2 - k_1 w / 4)
    np.testing.assert_allclose(value(k), np.mean([(-0.15 * w - 0.05 * w) ** 2 for w in (1, 2)]), rtol=1e-9)
    gradient = jax.grad(value)(k)
    assert gradient[0] != 0 and gradient[1] == 0


def test_pairs_are_skip_intervals_apart_and_equally_likely():
    net = student(lambda x, t, w: 0 * x)
    batch = draw(net, steps=10, skip=3, scale_min=2.0, scale_max=6.0)
    t, s, w = (np.asarray(v, np.float64) for v in (batch["t"], batch["s"], batch["cond"]["guidance"]))
    np.testing.assert_allclose(t - s, 0.3, atol=1e-6)
    levels, counts = np.unique(np.round(s * 10), return_counts=True)
    np.testing.assert_array_equal(levels, np.arange(8))
    assert np.abs(counts - 500).max() < 100
    assert 2 <= w.min() < 2.05 and 5.95 < w.max() <= 6 and abs(w.mean() - 4) < 0.1
    assert abs(np.corrcoef(w, s)[0, 1]) < 0.05 and abs(batch["z"].std() - 1) < 0.05
    shifted = draw(net, steps=4, grid={"name": "uniform", "shift": 3.0})
    np.testing.assert_allclose(np.unique(shifted["t"]), times.grid(4, RF, shift=3.0)[3::-1], rtol=1e-6)
    ends = draw(net, teacher=labelled(jnp.add, jnp.add, "eps"), steps=2)
    assert float(ends["t"].max()) == pytest.approx(1000 / 1001)  # where the teacher determines the image


def test_defaults():
    """Intervals of 20 of 1,000 steps, the paper's scales (w + 1 here), 10 times a step of 1,000."""
    net = student(lambda x, t, w: 0 * x)
    batch = draw(net)
    np.testing.assert_allclose(batch["t"] - batch["s"], 0.02, atol=1e-6)
    w = batch["cond"]["guidance"]
    assert 3 <= w.min() < 3.1 and 14.9 < w.max() <= 15
    given = {**draw(net, n=4), "cond": {"label": jnp.zeros(4, int), "guidance": jnp.ones(4)}, "t": jnp.full(4, 1e-4), "s": jnp.zeros(4)}
    nets = {"net": student(lambda x, t, w: 1 - x), "target": net, "teacher": labelled(lambda x, t: 0 * x, lambda x, t: 0 * x)}
    assert loss(nets, given)[0] == loss(nets, given, timestep_scaling=10_000.0, metric="l2", solver="ddim")[0]
    assert loss(nets, given, metric="pseudo_huber")[0] == loss(nets, given, metric="pseudo_huber", huber=0.00054)[0]


def test_refusals():
    net = student(lambda x, t, w: 0 * x)
    with pytest.raises(ConfigError, match="set model.guidance_embed = True"):
        draw(exact.gaussian([0.0], 1.0).model(RF))
    for skip in (0, 51):
        with pytest.raises(ConfigError, match=f"objective.skip = {skip} should be from 1 to objective.steps = 50"):
            draw(net, skip=skip)
    with pytest.raises(ConfigError, match="objective.scale_max = 1.0 should be at least objective.scale_min = 2.0"):
        draw(net, scale_min=2.0, scale_max=1.0)
    zero, cond = jnp.zeros((1, 1)), {"label": jnp.zeros(1, int), "guidance": jnp.ones(1)}
    batch = {"x": zero, "z": zero, "t": jnp.full(1, 0.5), "s": jnp.zeros(1), "cond": cond}
    nets = {"net": net, "target": net, "teacher": labelled(jnp.add, jnp.add)}
    for settings, changed, words in (
        ({"timestep_scaling": -1.0}, {}, "objective.timestep_scaling = -1.0"),
        ({"solver": "rk4"}, {}, "valid: euler, heun, ddim"),
        ({"timestep_scaling": 0.0}, {"net": student(jnp.add, "x")}, r"need f\(x, 0\) = x"),
        ({}, {"net": student(jnp.add, "score")}, r"need f\(x, 0\) = x"),
        ({}, {"teacher": labelled(jnp.add, jnp.add, path=paths.trigonometric())}, "roles.teacher was trained with another path"),
        ({}, {"teacher": exact.gaussian([0.0], 1.0).model(RF)}, "needs a model with a null condition"),
    ):
        with pytest.raises(ConfigError, match=words):
            loss({**nets, **changed}, batch, **settings)
    assert objectives.OBJECTIVES["latent_consistency"].conditions == {"guidance": ()}
