"""Progressive distillation: the last student is the teacher's product of steps, on every path and for every prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowjax import exact, objectives, paths, predictions, samplers, times
from flowjax.config import ConfigError
from flowjax.objectives import progressive
from flowjax.predictions import Model

pytestmark = pytest.mark.usefixtures("float64")
RF = paths.rectified()


def linear(path, factors, n):
    """The x-predicting student of data N(0, .) whose DDIM step from (j+1)/n to j/n multiplies by factors[j]."""

    def apply(x_t, t, cond, key):
        j = jnp.round(t * n).astype(int)
        s = (j - 1) / n
        return progressive.implied(path, x_t, factors[j - 1][:, None] * x_t, t, s)

    return Model(apply, path, "x")


@pytest.mark.parametrize("variance, steps, factor", [(0.25, 4, 0.34054054), (0.25, 16, 0.45568309), (1.0, 4, 0.72)])
def test_halving_down_to_one_step_keeps_the_teachers_product(variance, steps, factor):
    """Published nowhere, worked out by hand: N Euler steps on N(0, s2) multiply by prod 1 - h v(t), not by s."""
    teacher, n = exact.gaussian([0.0], variance).model(RF), steps
    while n > 1:
        n //= 2
        x = jax.random.normal(jax.random.key(n), (64, 1)) * variance**0.5
        nets = {"net": Model(None, RF, "velocity"), "teacher": teacher}
        batch = objectives.build({"name": "progressive_distillation", "steps": n}).rollout(nets, {"x": x, "cond": {}}, jax.random.key(0))
        j = np.round(np.asarray(batch["t"]) * n).astype(int)
        s = (j - 1) / n
        ends = np.asarray(RF.perturb(batch["goal"], (batch["x_t"] - RF.a(batch["t"])[:, None] * batch["goal"]) / batch["t"][:, None], s))
        ratio = ends[:, 0] / np.asarray(batch["x_t"])[:, 0]
        factors = np.array([ratio[j == k][0] for k in range(1, n + 1)])
        np.testing.assert_allclose(ratio, factors[j - 1], rtol=1e-6)  # linear, so every row of a time agrees
        teacher = linear(RF, jnp.asarray(factors), n)
    np.testing.assert_allclose(factors, [factor], rtol=1e-6)


@pytest.mark.parametrize("path", ["rectified", "trigonometric", "vp_cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x", "v"])
def test_one_ddim_step_of_a_perfect_student_lands_where_two_of_the_teacher_do(path, prediction):
    path = paths.PATHS[path]()
    data = exact.mixture([0.3, 0.7], [[-1.0, 0.5], [0.8, 0.0]], [0.3, 0.5])
    net = Model(None, path, prediction)
    bound = objectives.build({"name": "progressive_distillation", "steps": 4})
    teacher = data.model(path)
    batch = bound.rollout({"net": net, "teacher": teacher}, {"x": jax.random.normal(jax.random.key(0), (32, 2)), "cond": {}}, jax.random.key(1))
    grid = times.grid(8, path, prediction="velocity" if prediction == "velocity" else prediction)
    for i, (x_t, t) in enumerate(zip(batch["x_t"], np.asarray(batch["t"]))):
        k = int(np.abs(grid - t).argmin())
        assert k % 2 == 0
        two = samplers.sample(teacher, x_t[None], jax.random.key(2), grid[k : k + 3], "ddim")
        y = predictions.convert(path, "x", prediction, batch["goal"][i : i + 1], x_t[None], t)
        student = net.replace(apply=lambda x_t, t, cond, key, y=y: y)
        one = samplers.sample(student, x_t[None], jax.random.key(2), grid[[k, k + 2]], "ddim")
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-5)


def test_velocity_target_is_the_mean_of_the_teachers_two():
    """An untrained teacher too: x_t - x_s over a step of the rectified path, which is (v(x_t, t) + v(x_m, m)) / 2."""
    teacher = Model(lambda x_t, t, cond, key: jnp.sin(3 * x_t) + t[:, None], RF, "velocity")
    nets = {"net": Model(None, RF, "velocity"), "teacher": teacher}
    batch = objectives.build({"name": "progressive_distillation", "steps": 3}).rollout(
        nets, {"x": jax.random.normal(jax.random.key(0), (8, 2)), "cond": {}}, jax.random.key(1)
    )
    x_t, t = batch["x_t"], batch["t"]
    first = teacher(x_t, t)
    second = teacher(x_t - first / 6, t - 1 / 6)
    np.testing.assert_allclose((x_t - batch["goal"]) / t[:, None], (first + second) / 2, atol=1e-5)


def test_guidance_of_the_teacher():
    null = lambda cond: {"label": jnp.full_like(cond["label"], 2)}  # noqa: E731
    teacher = Model(lambda x_t, t, cond, key: x_t * (cond["label"][:, None] + 1.0), RF, "velocity", null)
    nets = {"net": Model(None, RF, "velocity"), "teacher": teacher}
    batch = {"x": jnp.ones((8, 1)), "cond": {"label": jnp.zeros(8, int)}}
    plain, guided = (
        objectives.build({"name": "progressive_distillation", "steps": 1, "guidance": g}).rollout(nets, batch, jax.random.key(0))
        for g in ("none", {"name": "cfg", "scale": 3.0})
    )
    # v = 1 x for the class, 3 x without one, hence -3 x guided: two half steps multiply by (1 + 3/2)^2.
    np.testing.assert_allclose(guided["goal"], guided["x_t"] * 2.5**2, rtol=1e-5)
    np.testing.assert_allclose(plain["goal"], plain["x_t"] * 0.25, rtol=1e-5)


def test_refusals():
    nets = {"net": Model(None, RF, "velocity"), "teacher": Model(None, paths.trigonometric(), "velocity")}
    batch = {"x": jnp.ones((2, 1)), "cond": {}}
    with pytest.raises(ConfigError, match="roles.teacher was trained with another path"):
        objectives.build({"name": "progressive_distillation", "steps": 1}).rollout(nets, batch, jax.random.key(0))
    with pytest.raises(ConfigError, match="objective.steps = 0"):
        objectives.build({"name": "progressive_distillation", "steps": 0}).rollout({**nets, "teacher": nets["net"]}, batch, jax.random.key(0))
    asks, batch = Model(None, RF, "velocity", guidance_embed=True), {"x": jnp.ones((2, 1)), "cond": {}}
    for net, teacher, message in ((asks, nets["net"], "roles.teacher takes no scale"), (nets["net"], asks, "set model.guidance_embed = True")):
        with pytest.raises(ConfigError, match=message):
            stage = objectives.build({"name": "guided_progressive_distillation", "steps": 1})
            stage.rollout({"net": net, "teacher": teacher}, batch, jax.random.key(0))
