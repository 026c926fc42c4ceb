"""Consistency distillation (CD) and consistency training (CT), 2303.01469 algorithms 2 and 3; iCT choices 2310.14189.

Notation map: the paper's sigma is b/a; its boundary f(x, eps) = x holds here at t = 0 exactly, by construction, for every
prediction whose conversion to x is the identity there (velocity, v, edm, eps; rectified flow: f = x_t - t F).

    t, s = adjacent times of an N-step grid, s < t;  x_t = a x + b z
    CD: x_s = one ODE step of the frozen teacher from x_t         CT: x_s = a_s x + b_s z, the same x and z
    L = E omega d( f(x_t, t), sg f_target(x_s, s) )

`target` is an average of `net` (configure it as ema.target; decay 0 is iCT's choice).
"""

import jax
import jax.numpy as jnp

from flowjax import times
from flowjax.config import ConfigError, build, keywords
from flowjax.guidance import GUIDANCE
from flowjax.objectives.base import Objective, Player, mean_dims
from flowjax.paths import expand


def ode_step(model, x_t, t, s, solver: str):
    """One step of the probability-flow ODE from t to s, both (B,): "euler" or "heun"."""
    h = expand(t - s, x_t)
    k1 = model.get("velocity", x_t, t)
    if solver == "euler":
        return x_t - h * k1
    if solver == "heun":
        return x_t - h * (k1 + model.get("velocity", x_t - h * k1, s)) / 2
    raise ConfigError(f"objective.solver = {solver!r} is unknown; valid: euler, heun")


def boundary(net):
    """Refuse parameterisations for which f(x, 0) = x does not hold by construction."""
    if net.prediction in ("x", "score") or net.path.name == "ve":
        raise ConfigError(
            f"consistency objectives need f(x, 0) = x, which prediction {net.prediction!r} on path {net.path.name!r} does not "
            "give; use prediction velocity, v, edm or eps on a path with b(0) = 0"
        )


def intervals(batch, key, net, *, steps: int, schedule: str, steps_max: int, total_steps: int, grid, time):
    """Adjacent times (t, s), each (B,). The grid may be refined while training ("ct": 2303.01469 eq. for N(k))."""
    n = batch["x"].shape[0]
    if schedule == "constant":
        counts = [steps]
    elif schedule == "ct":  # N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1 grid points, N - 1 intervals
        counts = list(range(steps, steps_max + 1))
    elif schedule == "doubling":  # iCT: N(k) = min(s0 2^floor(k/K'), s1) + 1 grid points
        counts = [min(steps * 2**i, steps_max) for i in range(_stages(steps, steps_max) + 1)]
    else:
        raise ConfigError(f"objective.schedule = {schedule!r} is unknown; valid: constant, ct, doubling")
    tables = [times.grid(m, net.path, prediction=net.prediction, **keywords(grid)) for m in counts]
    width = max(counts) + 1
    table = jnp.asarray([list(g[::-1]) + [float(g[0])] * (width - len(g)) for g in tables], jnp.float32)  # ascending, padded
    row = _stage(batch["step"], counts, schedule, steps, steps_max, total_steps)
    count = jnp.asarray(counts)[row]
    if time == "uniform":
        i = jax.random.randint(key, (n,), 0, count)
    else:  # iCT: intervals drawn with the probability that the time law gives them
        u = times.draw(key, n, net.path, prediction=net.prediction, **keywords(time))
        i = jnp.clip(jnp.searchsorted(table[row], u, side="right") - 1, 0, count - 1)
    return table[row][i + 1], table[row][i]


def _stages(first: int, last: int) -> int:
    return max(0, (last // first).bit_length() - 1)


def _stage(step, counts, schedule, steps, steps_max, total_steps):
    progress = jnp.clip(step / total_steps, 0.0, 1.0)
    if schedule == "ct":
        n_points = jnp.ceil(jnp.sqrt(progress * ((steps_max + 1) ** 2 - steps**2) + steps**2) - 1) + 1
        return jnp.clip(n_points.astype(jnp.int32) - 1 - steps, 0, len(counts) - 1)
    if schedule == "doubling":
        return jnp.clip(jnp.floor(progress * len(counts)).astype(jnp.int32), 0, len(counts) - 1)
    return 0


def rollout(nets, batch, key, *, steps: int = 18, schedule: str = "constant", steps_max: int = 0, total_steps: int = 1,
            grid="uniform", time="uniform"):
    """Draw the time pair and the noise. `steps` counts the grid's intervals; `grid` and `time` are sections of flowjax.times."""
    net = nets["net"]
    boundary(net)
    key_t, key_z = jax.random.split(key)
    t, s = intervals(batch, key_t, net, steps=steps, schedule=schedule, steps_max=max(steps, steps_max),
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


def _loss(nets, batch, key, x_s, metric, huber, weighting):
    net, target, t, s, cond = nets["net"], nets["target"], batch["t"], batch["s"], batch["cond"]
    x_t = net.path.perturb(batch["x"], batch["z"], t)
    f = net.get("x", x_t, t, cond, key)
    # The same dropout key on both sides: otherwise the loss is not zero for equal networks at equal inputs.
    goal = jax.lax.stop_gradient(target.get("x", x_s, s, cond, key))
    error = distance(f, goal, metric, huber)
    if weighting == "inverse_gap":  # iCT: 1/(sigma_t - sigma_s)
        omega = 1.0 / (net.path.sigma(jnp.minimum(t, 0.999)) - net.path.sigma(jnp.minimum(s, 0.999)) + 1e-8)
    elif weighting == "none":
        omega = jnp.ones_like(t)
    else:
        raise ConfigError(f"objective.weighting = {weighting!r} is unknown; valid: none, inverse_gap")
    return jnp.mean(omega * error), {"distance": jnp.mean(error)}


def distillation_loss(nets, batch, key, *, solver: str = "heun", guidance="none", metric: str = "l2", huber: float = 0.00054,
                      weighting: str = "none"):
    """CD loss. `guidance` is a section of flowjax.guidance that wraps the teacher, so that one student call is guided."""
    net, teacher = nets["net"], nets["teacher"]
    if teacher.path != net.path:
        raise ConfigError(f"roles.teacher runs on path {teacher.path.name!r} but the trained network on {net.path.name!r} (or with other settings); they must agree")
    if guidance != "none":
        teacher = build(GUIDANCE, guidance, "objective.guidance", model=teacher)
    x_t = net.path.perturb(batch["x"], batch["z"], batch["t"])
    x_s = jax.lax.stop_gradient(ode_step(teacher.bind(batch["cond"]), x_t, batch["t"], batch["s"], solver))
    return _loss(nets, batch, key, x_s, metric, huber, weighting)


def training_loss(nets, batch, key, *, metric: str = "l2", huber: float = 0.00054, weighting: str = "none"):
    """CT loss: the teacher's step is replaced by the same x and z at s."""
    x_s = nets["net"].path.perturb(batch["x"], batch["z"], batch["s"])
    return _loss(nets, batch, key, x_s, metric, huber, weighting)


DISTILLATION = Objective({"net": "trained", "target": "ema:net", "teacher": "frozen"}, (Player("net", distillation_loss),), rollout)
TRAINING = Objective({"net": "trained", "target": "ema:net"}, (Player("net", training_loss),), rollout)
