"""Progressive distillation, 2202.00512 algorithm 2, for any path and prediction: one student step does two of the teacher's.

Notation map: time runs the same way; the paper's alpha, sigma are a, b.

    t = j/N of the student's N-step grid, m halfway to s = (j-1)/N on the teacher's of 2N steps
    x_m = DDIM(x_t, t -> m),  x_s = DDIM(x_m, m -> s), both by the frozen teacher
    x~ = (x_s - (b_s/b_t) x_t) / (a_s - (b_s/b_t) a_t)        the x that takes a DDIM step of the student from x_t to x_s
    L = E omega(t) mean_dims || net(x_t, t) - y(x~) ||^2

y(x~) is what a network of this prediction answers for x~; of velocity on the rectified path it is (x_t - x_s)/(t - s), the mean of
the teacher's two. A student for N steps teaches that for N/2: `experiments.progressive` runs the stages.

`GUIDED` is the second stage of 2210.03142 (section 3.2): teacher and student take the scale of guidance as an input, as networks of the
objective guidance_distillation do, and are asked with one scale, drawn anew for each example.
"""

import jax
import jax.numpy as jnp

from flowjax import predictions, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player, guidance_scale, guided, same_meaning
from flowjax.paths import expand


def ddim(model, x_t, t, s, cond):
    """x_s = a_s x_hat + b_s z_hat (2010.02502 eq. 12 with sigma = 0), t and s (B,)."""
    x, z = model.x_and_z(x_t, t, cond)
    return model.path.perturb(x, z, s)


def implied(path, x_t, x_s, t, s):
    """The x whose DDIM step takes x_t at t to x_s at s."""
    ratio = path.b(s) / path.b(t)
    return (x_s - expand(ratio, x_t) * x_t) / expand(path.a(s) - ratio * path.a(t), x_t)


def rollout(nets, batch, key, *, steps: int, grid="uniform", guidance="none"):
    """Draw one of the student's `steps` times and noise, and let the teacher go two steps.

    grid: a section of times.grid, with 2 `steps` steps for the teacher, every other time of which is the student's. guidance: a section
    of flowjax.guidance that wraps the teacher, for the first stage: its students are guided without it.
    """
    net, teacher = nets["net"], nets["teacher"]
    same_meaning(teacher, net, "roles.teacher", ("path",))
    if steps < 1:
        raise ConfigError(f"objective.steps = {steps} should be at least 1")
    teacher = guided(teacher, guidance)
    # From where both networks determine the image.
    narrowest = min(net.prediction, teacher.prediction, key=lambda name: times.interval(net.path, name)[1])
    edges = jnp.asarray(times.grid(2 * steps, net.path, prediction=narrowest, **keywords(grid)), jnp.float32)
    key_t, key_z = jax.random.split(key)
    x, cond = batch["x"], batch["cond"]
    j = 2 * jax.random.randint(key_t, x.shape[:1], 0, steps)
    t, m, s = edges[j], edges[j + 1], edges[j + 2]
    z = jax.random.normal(key_z, x.shape, x.dtype)
    x_t = net.path.perturb(x, z, t)
    x_s = ddim(teacher, ddim(teacher, x_t, t, m, cond), m, s, cond)
    return {**batch, "t": t, "x_t": x_t, "goal": implied(net.path, x_t, x_s, t, s)}


def guided_rollout(nets, batch, key, *, steps: int, grid="uniform", scale_min: float = 1.0, scale_max: float = 5.0):
    """`rollout` with a scale for each example, uniform in [scale_min, scale_max], which becomes cond["guidance"] of both networks."""
    if not nets["teacher"].guidance_embed:
        raise ConfigError("roles.teacher takes no scale as an input; objective guidance_distillation makes one that does")
    key, key_scale = jax.random.split(key)
    scale = guidance_scale(nets["net"], key_scale, len(batch["x"]), scale_min, scale_max)
    return rollout(nets, {**batch, "cond": {**batch["cond"], "guidance": scale}}, key, steps=steps, grid=grid)


def loss(nets, batch, key, *, weight="truncated_snr"):
    """Weighted regression on the goal; `weight` is a section of flowjax.weights. Metric `mse` is unweighted."""
    net, t, x_t = nets["net"], batch["t"], batch["x_t"]
    y = predictions.convert(net.path, "x", net.prediction, batch["goal"], x_t, t)
    return flow_matching.weighted(net, t, net(x_t, t, batch["cond"], key), y, weight)


OBJECTIVE = Objective({"net": "trained", "teacher": "frozen"}, (Player("net", loss),), rollout)
GUIDED = OBJECTIVE._replace(rollout=guided_rollout, conditions={"guidance": ()}, shared=True)
