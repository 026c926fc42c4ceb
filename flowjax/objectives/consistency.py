"""Consistency distillation (CD) and consistency training (CT), 2303.01469 algorithms 2 and 3; iCT choices 2310.14189.

Notation map: the paper's sigma is b/a; its boundary f(x, eps) = x holds here at t = 0 exactly, by construction, for every
prediction whose conversion to x is the identity there (velocity, v, edm, eps; rectified flow: f = x_t - t F). On the vp paths
grids end at t_min, where f differs from x by b(t_min) F, about 1e-3 F. A network that predicts x answers with anything there: at
t_min its f is the input itself and the network is not asked, as LCM's scalings (flowjax.objectives.lcm) have it but for a few millionths.

    t, s = adjacent times of an N-step grid, s < t;  x_t = a x + b z
    CD: x_s = one ODE step of the frozen teacher from x_t         CT: x_s = a_s x + b_s z, the same x and z
    L = E omega d( f(x_t, t), sg f_target(x_s, s) )

`target` is an average of `net` (configure it as ema.target; decay 0 is iCT's choice).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import config, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives.base import Objective, Player, guided, mean_dims, same_meaning
from flowjax.paths import expand


def ode_step(model, x_t, t, s, solver: str):
    """One step of the probability-flow ODE from t to s, both (B,): "euler", "heun" (Euler where s is beyond the model's times) or "ddim"."""
    if solver == "ddim":
        return model.path.perturb(*model.x_and_z(x_t, t), s)
    h = expand(t - s, x_t)
    k1 = model.get("velocity", x_t, t)
    if solver == "euler":
        return x_t - h * k1
    if solver == "heun":
        lowest = times.interval(model.path, model.prediction)[0]
        k2 = model.get("velocity", x_t - h * k1, s)
        return x_t - h * (k1 + jnp.where(expand(s >= lowest, x_t), k2, k1)) / 2
    raise ConfigError(f"objective.solver = {solver!r} is unknown; valid: euler, heun, ddim")


def boundary(net, others=()):
    """Refuse parameterisations for which f(x, 0) = x does not hold by construction, but for predictions `others`, of which the caller sees to it."""
    if net.prediction in {"x", "score"}.difference(others) or net.path.name == "ve":
        raise ConfigError(
            f"consistency objectives need f(x, 0) = x, which prediction {net.prediction!r} on path {net.path.name!r} does not "
            "give; use prediction velocity, v, edm or eps on a path with b(0) = 0"
        )


def interval_counts(schedule: str, steps: int, steps_max: int, total_steps: int):
    """(counts, stage): the numbers of intervals that training goes through, and the function from step to an index into them.

    "constant": `steps`. "ct" (2303.01469 app. C): N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1 grid points; "doubling"
    (2310.14189 eq. 6): N(k) = min(s0 2^floor(k/K'), s1) + 1 with K' = floor(K / (log2 floor(s1/s0) + 1)). We count intervals,
    N - 1, so that both run from `steps` to `steps_max`: the paper's s0 is steps + 1 for "ct" and steps for "doubling".
    """
    if schedule == "constant":
        return [steps], lambda step: 0
    if schedule not in ("ct", "doubling"):
        raise ConfigError(f"objective.schedule = {schedule!r} is unknown; valid: constant, ct, doubling")
    if steps_max < steps or total_steps < 1:
        raise ConfigError(
            f"objective.schedule = {schedule!r} needs steps_max >= steps and total_steps (the run's steps); "
            f"got steps = {steps}, steps_max = {steps_max}, total_steps = {total_steps}"
        )
    if schedule == "ct":
        counts, first = list(range(steps, steps_max + 1)), (steps + 1) ** 2

        def stage(step):
            squared = step / total_steps * ((steps_max + 1) ** 2 - first) + first
            return jnp.ceil(jnp.sqrt(squared) - 1).astype(jnp.int32) - steps
    else:
        doublings = math.log2(steps_max // steps)
        counts = [min(steps * 2**i, steps_max) for i in range(math.ceil(doublings) + 1)]

        def stage(step):
            return step // max(1, math.floor(total_steps / (doublings + 1)))

    return counts, lambda step: jnp.clip(stage(step), 0, len(counts) - 1)


def intervals(key, n: int, step, nets, *, steps, schedule, steps_max, total_steps, grid, time):
    """Adjacent times (t, s), each (n,), t > s, on the grid of training step `step`."""
    path, prediction = nets["net"].path, nets["net"].prediction
    # The grid starts where both networks that are evaluated on it determine a velocity.
    taught_by = nets.get("teacher", nets["net"]).prediction
    narrowest = min(prediction, taught_by, key=lambda name: times.interval(path, name)[1])
    counts, stage = interval_counts(schedule, steps, steps_max, total_steps)
    grids = [times.grid(m, path, prediction=narrowest, **keywords(grid))[::-1] for m in counts]
    edges = np.stack([np.pad(g, (0, max(counts) + 1 - len(g)), "edge") for g in grids])  # ascending, the last repeated
    row = stage(step)
    name, law = config.split(time, "objective.time")
    if name == "intervals":
        config.check(lambda: None, law, "objective.time")
        i = jax.random.randint(key, (n,), 0, jnp.asarray(counts)[row])
    else:
        # The law restricted to the grid; what it clips to the end of the path does not fall into the last interval.
        inner = np.minimum(edges, np.nextafter(edges[:, -1:], 0.0))
        p = times.cdf(inner, path, name, prediction=prediction, **law)
        p = jnp.asarray((p[:, 1:] - p[:, :1]) / (p[:, -1:] - p[:, :1]), jnp.float32)
        i = jnp.searchsorted(p[row], jax.random.uniform(key, (n,)), side="right")
    ascending = jnp.asarray(edges, jnp.float32)[row]
    return ascending[i + 1], ascending[i]


def rollout(nets, batch, key, *, steps: int = 18, schedule: str = "constant", steps_max: int = 0, total_steps: int = 0,
            grid="uniform", time="intervals"):
    """Draw adjacent times t > s and the noise.

    `steps` counts the grid's intervals, `grid` is a section of times.grid; schedule, steps_max and total_steps refine the grid in
    training (interval_counts). `time`: "intervals" for equally likely intervals, or a section of times.draw whose law they follow.
    """
    boundary(nets["net"], ("x",))
    t_min = nets["net"].path.t_min
    if nets["net"].prediction == "x" and (end := keywords(grid).get("t_end", t_min)) != t_min:
        raise ConfigError(f"objective.grid.t_end = {end}: a network that predicts x is consistent with the data at {t_min}, where its grid has to end")
    key_t, key_z = jax.random.split(key)
    t, s = intervals(key_t, len(batch["x"]), batch["step"], nets, steps=steps, schedule=schedule, steps_max=steps_max,
                     total_steps=total_steps, grid=grid, time=time)
    return {**batch, "t": t, "s": s, "z": jax.random.normal(key_z, batch["x"].shape, batch["x"].dtype)}


def distance(f, goal, metric: str, huber: float):
    """d(f, goal) per example: "l2" (mean of squares) or "pseudo_huber" sqrt(||u||^2 + c^2) - c with c = huber sqrt(D)."""
    if metric == "l2":
        return mean_dims(jnp.square(f - goal))
    if metric == "pseudo_huber":
        dims = f[0].size
        c = huber * dims**0.5
        return jnp.sqrt(mean_dims(jnp.square(f - goal)) * dims + c**2) - c
    raise ConfigError(f"objective.metric = {metric!r} is unknown; valid: l2, pseudo_huber")


def inverse_gap(path, t, s):
    """iCT's weight 1 / (sigma_t - sigma_s), (B,); from pure noise (a = 0) the gap counts as max(sigma_s, 1), or it had no weight."""
    sigma_s, a = path.sigma(s), path.a(t)
    finite = a > 1e-6
    sigma_t = path.b(t) / jnp.where(finite, a, 1.0)
    return 1.0 / jnp.where(finite, sigma_t - sigma_s, jnp.maximum(sigma_s, 1.0))


def _loss(nets, batch, key, x_s, metric, huber, weighting):
    net, target, t, s, cond = nets["net"], nets["target"], batch["t"], batch["s"], batch["cond"]
    x_t = net.path.perturb(batch["x"], batch["z"], t)
    f = net.get("x", x_t, t, cond, key)
    # The same dropout key on both sides: otherwise the loss is not zero for equal networks at equal inputs.
    goal = target.get("x", x_s, s, cond, key)
    if target.prediction == "x":
        goal = jnp.where(expand(s <= target.path.t_min, x_s), x_s, goal)
    goal = jax.lax.stop_gradient(goal)
    error = distance(f, goal, metric, huber)
    if weighting == "inverse_gap":
        omega = inverse_gap(net.path, t, s)
    elif weighting == "none":
        omega = jnp.ones_like(t)
    else:
        raise ConfigError(f"objective.weighting = {weighting!r} is unknown; valid: none, inverse_gap")
    return jnp.mean(omega * error), {"distance": jnp.mean(error)}


def distillation_loss(nets, batch, key, *, solver: str = "heun", guidance="none", metric: str = "l2", huber: float = 0.00054,
                      weighting: str = "none"):
    """CD loss. `guidance` is a section of flowjax.guidance that wraps the teacher, so that one student call is guided."""
    net, teacher = nets["net"], nets["teacher"]
    same_meaning(teacher, net, "roles.teacher", ("path",))
    teacher = guided(teacher, guidance)
    x_t = net.path.perturb(batch["x"], batch["z"], batch["t"])
    x_s = ode_step(teacher.bind(batch["cond"]), x_t, batch["t"], batch["s"], solver)  # its gradient stops at the goal in _loss
    return _loss(nets, batch, key, x_s, metric, huber, weighting)


def training_loss(nets, batch, key, *, metric: str = "l2", huber: float = 0.00054, weighting: str = "none"):
    """CT loss: the teacher's step is replaced by the same x and z at s."""
    x_s = nets["net"].path.perturb(batch["x"], batch["z"], batch["s"])
    return _loss(nets, batch, key, x_s, metric, huber, weighting)


DISTILLATION = Objective({"net": "trained", "target": "ema:net", "teacher": "frozen"}, (Player("net", distillation_loss),), rollout)
TRAINING = Objective({"net": "trained", "target": "ema:net"}, (Player("net", training_loss),), rollout)
