"""Rewards by their gradient: ReFL (2304.05977 alg. 1), and DRaFT-K (2309.17400), through the end of a deterministic sampler.

    x_i     a state of `steps` Euler steps, without gradient
    x_hat   after through - 1 further steps and the prediction of x at the last of the times, with gradient
    L = -strength r(x_hat), or strength relu(margin - r);    + pretrain * flow matching on data + anchor * mean_dims |v - v_ref|^2

ReFL: through = 1, and every example jumps from a state of its own among the last `late` (the authors draw one for the whole batch;
40 steps, late 10, margin 2, strength 1e-3). DRaFT-K: late = 1, through = K; K = steps is the whole sampler. Both above 1 truncate
at random, as AlignProp (2310.03739) does. On the rectified path dx_hat/dv = -t: the latest states say least. Each step is computed
again on the way back, so that memory grows by one state a step.

A reward alone is soon exploited (saturated colours, texture, one mode): hence the flow-matching term, which ReFL's paper has and
its code does not, and the anchor, the squared distance from the reference's velocity at x_i. Nothing is guided.
"""

import jax
import jax.numpy as jnp

from flowjax import samplers, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives import flow_matching, groups
from flowjax.objectives.base import Objective, Player, mean_dims, same_meaning
from flowjax.paths import expand


def euler(net, x, t, s, cond):
    """The Euler step from t to s, each scalar or (B,)."""
    return x - expand(t - s, x) * net.get("velocity", x, t, cond)


def rollout(
    nets, batch, key, *, steps: int = 40, grid="uniform", through: int = 1, late: int = 10, pretrain: float = 0.0, time="uniform"
):
    """Draw the states x_in at which gradients begin, the times "at" (B, through) of what follows, and what flow matching draws.

    steps, grid: those of sampling; time: a section of flowjax.times, for the flow-matching term.
    """
    net, (n, *shape) = nets["net"], batch["x"].shape
    if not pretrain and time != "uniform":
        raise ConfigError(f"objective.time = {time!r} is the law of flow matching, which takes no part without objective.pretrain")
    if through < 1 or late < 1 or through + late - 1 > steps:
        bounds = f"should be at least 1, and through + late - 1 at most steps = {steps}"
        raise ConfigError(f"objective.through = {through} and objective.late = {late} {bounds}")
    at = jnp.asarray(times.grid(steps, net.path, prediction=net.prediction, **keywords(grid))[:-1], jnp.float32)
    key_start, key_pick, key_data = jax.random.split(key, 3)
    last = steps - through

    def walk(x, step):
        return euler(net, x, *step, batch["cond"]), x

    end, before = jax.lax.scan(walk, samplers.noise(net.path, key_start, (n, *shape), at[0]), (at[:last], at[1 : last + 1]))
    states = jnp.concatenate([before, end[None]])
    pick = jax.random.randint(key_pick, (n,), last - late + 1, last + 1)
    data = flow_matching.rollout(nets, batch, key_data, time=time) if pretrain else {"cond": batch["cond"]}
    return {
        **data,
        "x_in": states[pick, jnp.arange(n)], "at": at[pick[:, None] + jnp.arange(through)],
    }  # fmt: skip


def loss(
    nets, batch, key, *, reward, strength: float = 1.0, margin: float = None, pretrain: float = 0.0, weight="none",
    anchor: float = 0.0,
):  # fmt: skip
    """The reward's loss and what holds the network back; reward: a section of flowjax.rewards; weight: that of flow matching.

    Metrics: reward (each of several as well), mse of flow matching, drift (the anchor's distance, where there is a reference).
    """
    net, cond, at = nets["net"], batch["cond"], batch["at"]
    if anchor < 0 or pretrain < 0 or strength <= 0:
        raise ConfigError(f"objective.strength = {strength} should be positive, pretrain = {pretrain} and anchor = {anchor} not negative")
    if not pretrain and weight != "none":
        raise ConfigError(f"objective.weight = {weight!r} is that of flow matching, which takes no part without objective.pretrain")
    if bool(anchor) != ("reference" in nets):
        raise ConfigError(f"objective.anchor = {anchor}: above 0 it needs roles.reference, which takes no part otherwise")

    def step(x, t_and_s):
        return euler(net, x, *t_and_s, cond), None

    x, _ = jax.lax.scan(jax.checkpoint(step), batch["x_in"], (at.T[:-1], at.T[1:]))
    total, each = groups.judged(nets, net.get("x", x, at[:, -1], cond), cond, reward)
    value = strength * jnp.mean(-total if margin is None else jax.nn.relu(margin - total))
    metrics = groups.metrics(total, each)
    if pretrain:
        on_data, told = flow_matching.loss(nets, batch, key, weight=weight)
        value, metrics = value + pretrain * on_data, metrics | told
    if anchor:
        same_meaning(nets["reference"], net, "roles.reference", ("path",))
        own, other = (nets[k].get("velocity", batch["x_in"], at[:, 0], cond) for k in ("net", "reference"))
        drift = jnp.mean(mean_dims(jnp.square(own - jax.lax.stop_gradient(other))))
        value, metrics["drift"] = value + anchor * drift, drift
    return value, metrics


OBJECTIVE = Objective(
    {"net": "trained", "reference": "optional", "reward": "optional"}, (Player("net", loss),), rollout,
    {"reference": "denoiser", "reward": groups.JUDGES}, pixels=True,
)  # fmt: skip
