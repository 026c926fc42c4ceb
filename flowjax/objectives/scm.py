"""Continuous-time consistency models (sCM), 2410.11081, as distillation and as training, for any path and prediction.

The paper's TrigFlow is the trigonometric path with prediction v, up to its angle pi t / 2. For a network y = c x + d z (of this row,
flowjax.predictions), f is its x-prediction, v the velocity of the flow at x_t, and x_hat, z_hat, u are what y says of x, z and v:

    dy/dt = jvp(y, (x_t, t), (v, 1))                                        along the flow
    g = a / W ( d (v - u)  -  r b (dy/dt - c' x_hat - d' z_hat) )           W = a b' - a' b,  r = min(1, step / warmup)
    L = E sum_dims || y - sg(y + g / (||g|| + offset)) ||^2

With r = 1, g = a / W (a d - b c) df/dt: the change of y that changes f by -(a b / W) df/dt, on whatever path, which is algorithm 1's
cos^2 (dx/dt - F) - r cos sin (x_t + dF/dt) on TrigFlow. It is 0 where f is constant along the flow. With r = 0 it pulls y to that of v.
Distillation takes v from the teacher, training that of the pair, a' x + b' z.

Left out: the learned weight e^u(t) / dims. Its optimum is one over the mean square of what is left of g at t, which the norm has made
almost 1, so the sum over dimensions stands for it. There is no target network. The loss differentiates the network by t: give it
model.time_scale = 1.
"""

import jax
import jax.numpy as jnp

from flowjax import predictions
from flowjax.config import ConfigError
from flowjax.models.attention import jvp
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player, guided, mean_dims, same_meaning
from flowjax.objectives.consistency import boundary
from flowjax.paths import expand


def rollout(nets, batch, key, *, time="uniform"):
    """What flow_matching draws. `time`: the paper's is {"name": "edm_lognormal", "p_mean": -1.0, "p_std": 1.4} for data of standard deviation
    1/2; for others p_mean grows by the log of twice the deviation: -0.31 where it is 1."""
    boundary(nets["net"])
    return flow_matching.rollout(nets, batch, key, time=time)


def tangent(net, x_t, t, v, cond, key, warm):
    """(y, g) of the header, y with its gradient and g without; warm is r."""
    path, ones = net.path, jnp.ones_like(t)
    y, dy = jvp(lambda x_t, t: net(x_t, t, cond, key), (x_t, t), (v, ones))
    x_hat, z_hat = predictions.to_x_and_z(path, net.prediction, y, x_t, t)
    u = predictions.convert(path, net.prediction, "velocity", y, x_t, t)
    (_, d), (dc, dd) = jax.jvp(lambda t: predictions.row(path, net.prediction, t), (t,), (ones,))
    turn = dy - expand(dc, x_t) * x_hat - expand(dd, x_t) * z_hat
    g = expand(path.a(t) / path.wronskian(t), x_t) * (expand(d, x_t) * (v - u) - expand(warm * path.b(t), x_t) * turn)
    return y, jax.lax.stop_gradient(g)


def _loss(nets, batch, key, v, warmup, normalise, offset):
    if warmup < 0 or offset < 0:
        raise ConfigError(f"objective.warmup = {warmup} and objective.offset = {offset} should be at least 0")
    net, t = nets["net"], batch["t"]
    warm = jnp.minimum(1.0, batch["step"] / warmup) if warmup else 1.0
    y, g = tangent(net, flow_matching.noisy(net, batch), t, v, batch["cond"], key, warm)
    size = g[0].size
    metrics = {"tangent": jnp.sqrt(jnp.mean(mean_dims(jnp.square(g))))}
    if normalise:
        g = g / (expand(jnp.sqrt(size * mean_dims(jnp.square(g))), g) + offset)
    return size * jnp.mean(mean_dims(jnp.square(y - jax.lax.stop_gradient(y + g)))), metrics


def distillation_loss(nets, batch, key, *, guidance="none", warmup: int = 10_000, normalise: bool = True, offset: float = 0.1):
    """sCD. `guidance` is a section of flowjax.guidance that wraps the teacher; metric `tangent`: root mean square of g before its norm.

    warmup: steps until r = 1, 0 for at once; normalise, offset: the norm of g, and c.
    """
    net, teacher = nets["net"], nets["teacher"]
    same_meaning(teacher, net, "roles.teacher", ("path",))
    v = guided(teacher, guidance).get("velocity", flow_matching.noisy(net, batch), batch["t"], batch["cond"])
    return _loss(nets, batch, key, v, warmup, normalise, offset)


def training_loss(nets, batch, key, *, warmup: int = 10_000, normalise: bool = True, offset: float = 0.1):
    """sCT: the pair's own velocity in place of the teacher's."""
    v = predictions.target(nets["net"].path, "velocity", batch["x"], batch["z"], batch["t"])
    return _loss(nets, batch, key, v, warmup, normalise, offset)


DISTILLATION = Objective({"net": "trained", "teacher": "frozen"}, (Player("net", distillation_loss),), rollout)
TRAINING = Objective({"net": "trained"}, (Player("net", training_loss),), rollout)
