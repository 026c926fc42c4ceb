"""Flow maps: networks u(x_t, t, step) that answer with the mean velocity over a step, so that x_s = x_t - (t - s) u at any s = t - step.

MeanFlow (2505.13447; time as here) and shortcut models (2410.12557; their t is 1 - t here, their velocity minus ours). With step 0
u is the velocity itself, and all other samplers see that; sampler "flow_map" takes the steps. v = a' x + b' z is the velocity of the
pair, of which the expectation is the flow's.

    MeanFlow: r <= t, step = t - r;  u, du = jvp(u, (x_t, t, step), (v, 1, 1))      r is held, so the step grows with t
        L = E w ||u - sg(v - step du)||^2,  w = sg (||.||^2 + c)^-p,  the norm a sum over dimensions
    shortcut: a share of the rows has a step d of 1, 1/2, ..., 1/finest, and t a multiple of it
        u_1 = u~(x_t, t, d/2),  u_2 = u~(x_t - d/2 u_1, t - d/2, d/2),  L = E mean_dims ||u - sg (u_1 + u_2)/2||^2
        the others have step 0 and v; halves of the finest step are taken as such, where the authors have a step of their own

u~ is the average `target`. Guidance is baked in: MeanFlow replaces v by scale v + (1 - scale - mix) u(., 0 | null) + mix u(., 0), an
effective scale of scale / (1 - mix); shortcut models guide u_1 and u_2 of the finest step by CFG.
"""

import jax
import jax.numpy as jnp

from flowjax import predictions, times
from flowjax.config import ConfigError, keywords
from flowjax.guidance import cfg
from flowjax.models.attention import jvp
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player, drop_condition, drop_rows, mean_dims
from flowjax.paths import expand


def check(net):
    """Refuse networks that do not answer with mean velocities."""
    if not net.step_embed or net.prediction != "velocity":
        raise ConfigError("flow maps are networks with model.step_embed = True and prediction 'velocity'")


def _share(name: str, value: float, n: int) -> int:
    """How many of n rows."""
    if not 0 <= value <= 1:
        raise ConfigError(f"objective.{name} = {value} should be from 0 to 1")
    return round(n * value)


def _metrics(square, step):
    """Mean of `square` (B,) over the rows whose step is 0 (`flow`) and over the others (`map`)."""
    part = lambda mask: jnp.sum(jnp.where(mask, square, 0.0)) / jnp.maximum(jnp.sum(mask), 1)  # noqa: E731
    return jax.lax.stop_gradient({"flow": part(step == 0), "map": part(step > 0)})


def meanflow_rollout(nets, batch, key, *, time="uniform", same: float = 0.75, label_drop: float = 0.0):
    """Draw t and r, the larger and the smaller of two times of the law `time`; in the share `same` of the rows r = t."""
    net, n = nets["net"], len(batch["x"])
    check(net)
    key, key_r, key_drop = jax.random.split(key, 3)
    batch = flow_matching.rollout(nets, batch, key, time=time)
    other = times.draw(key_r, n, net.path, prediction=net.prediction, **keywords(time))
    t, r = jnp.maximum(batch["t"], other), jnp.minimum(batch["t"], other)
    step = jnp.where(jnp.arange(n) < _share("same", same, n), 0.0, t - r)
    # Of all rows alike: the authors' code drops labels where the step is 0 only.
    cond, dropped = drop_rows(net, batch["cond"], key_drop, label_drop, n)
    return {**batch, "t": t, "dropped": dropped, "cond": {**cond, "step": step}}


def meanflow_loss(nets, batch, key, *, scale: float = 1.0, mix: float = 0.0, power: float = 1.0, offset: float = 0.01, tangent=(0.0, 1.0)):
    """MeanFlow's loss. power, offset: p and c. tangent: of r and t beside v of x_t, whose right one is (0, 1); the others are for the paper's
    ablation (table 1b), which shows that they do not work. Metrics: the mean square per dimension where the step is 0 (`flow`) and where not (`map`)."""
    net, t, cond = nets["net"], batch["t"], batch["cond"]
    step = cond["step"]
    x_t = flow_matching.noisy(net, batch)
    v = pair = predictions.target(net.path, "velocity", batch["x"], batch["z"], t)
    if len(tangent) != 2:
        raise ConfigError(f"objective.tangent = {tangent} should be two numbers, of r and of t")
    if scale != 1 or mix != 0:
        if net.null is None:
            raise ConfigError("objective.scale and mix guide by a null condition, which this network does not have")
        now = {**cond, "step": jnp.zeros_like(step)}
        with_, without = net(x_t, t, now), net(x_t, t, net.null(now))
        v = scale * pair + (1 - scale - mix) * without + mix * with_
        v = jax.lax.stop_gradient(jnp.where(expand(batch["dropped"], v), pair, v))

    def u(x_t, t, step):
        return net(x_t, t, {**cond, "step": step}, key)

    by_r, by_t = tangent
    value, rate = jvp(u, (x_t, t, step), (v, jnp.full_like(t, by_t), jnp.full_like(step, by_t - by_r)))
    error = jnp.square(value - jax.lax.stop_gradient(v - expand(step, v) * rate))
    total = mean_dims(error) * error[0].size
    weight = jax.lax.stop_gradient((total + offset) ** -power) if power else 1.0
    return jnp.mean(weight * total), _metrics(mean_dims(error), step)


def shortcut_rollout(nets, batch, key, *, time="uniform", bootstrap: float = 0.25, finest: int = 64, guidance: float = 1.0, label_drop: float = 0.0):
    """Draw steps and times, and ask the average for the goals of the rows that bootstrap.

    bootstrap: the share of those rows; finest: steps of 1/finest are the smallest that are learned; guidance: scale of CFG.
    """
    net, target, x = nets["net"], nets["target"], batch["x"]
    check(net)
    if finest < 1 or finest & (finest - 1):
        raise ConfigError(f"objective.finest = {finest} should be a power of two")
    key, key_d, key_t, key_drop = jax.random.split(key, 4)
    batch = flow_matching.rollout(nets, batch, key, time=time)
    n = len(x)
    jump = jnp.arange(n) < _share("bootstrap", bootstrap, n)
    count = 2 ** jax.random.randint(key_d, (n,), 0, finest.bit_length())
    place = jax.random.randint(key_t, (n,), 0, count) + 1
    t = jnp.where(jump, place / count, batch["t"])
    step = jnp.where(jump, 1.0 / count, 0.0)
    # No label is dropped where the goal is the average's own.
    cond = drop_condition(net, batch["cond"], key_drop, label_drop)
    cond = {k: jnp.where(expand(jump, v), batch["cond"][k], v) for k, v in cond.items()}
    x_t = net.path.perturb(x, batch["z"], t)
    half, last = step / 2, count == finest

    def ask(x_t, t):
        plain = target(x_t, t, {**batch["cond"], "step": jnp.where(last, 0.0, half)})
        if guidance == 1:
            return plain
        guided = cfg(target, guidance)(x_t, t, {**batch["cond"], "step": jnp.zeros_like(half)})
        return jnp.where(expand(last, plain), guided, plain)

    first = ask(x_t, t)
    second = ask(x_t - expand(half, first) * first, t - half)
    pair = predictions.target(net.path, "velocity", x, batch["z"], t)
    goal = jnp.where(expand(jump, pair), (first + second) / 2, pair)
    return {**batch, "t": t, "goal": goal, "cond": {**cond, "step": step}}


def shortcut_loss(nets, batch, key):
    """Regression on the goals. Metrics: the mean square where the step is 0 (`flow`) and where not (`map`)."""
    net, t, step = nets["net"], batch["t"], batch["cond"]["step"]
    square = mean_dims(jnp.square(net(flow_matching.noisy(net, batch), t, batch["cond"], key) - batch["goal"]))
    return jnp.mean(square), _metrics(square, step)


MEANFLOW = Objective({"net": "trained"}, (Player("net", meanflow_loss),), meanflow_rollout, conditions={"step": ()})
SHORTCUT = Objective({"net": "trained", "target": "ema:net"}, (Player("net", shortcut_loss),), shortcut_rollout, conditions={"step": ()})
