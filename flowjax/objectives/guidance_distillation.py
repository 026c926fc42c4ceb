"""Guidance distillation: one call with the scale as an input learns what two calls of the teacher make (2210.03142 section 3.1).

Notation map: our scale w is the paper's 1 + w, so its U[0, 4] is U[1, 5] here. What is learned is the first of its two stages, which
guided_progressive_distillation goes on from; FLUX.1-dev has such an input as well.

    w ~ U[scale_min, scale_max],   u_w = u_0 + w (u_1 - u_0) of the teacher with the condition (1) and without (0)
    L = E omega(t) mean_dims ||net(x_t, t, cond, w) - sg u_w(x_t, t, cond)||^2

The student never goes without its condition: it has no null condition to be guided with afterwards, its input does that.
"""

import jax

from flowjax.guidance import cfg
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player, guidance_scale, same_meaning


def rollout(nets, batch, key, *, time="uniform", scale_min: float = 1.0, scale_max: float = 5.0):
    """What flow_matching draws, and a scale for each example, uniform in [scale_min, scale_max], which becomes cond["guidance"]."""
    key, key_scale = jax.random.split(key)
    scale = guidance_scale(nets["net"], key_scale, len(batch["x"]), scale_min, scale_max)
    batch = flow_matching.rollout(nets, batch, key, time=time)
    return {**batch, "cond": {**batch["cond"], "guidance": scale}}


def loss(nets, batch, key, *, weight="none"):
    """Weighted regression of the guided teacher; `weight` is a section of flowjax.weights. Metric `mse` is unweighted."""
    net, teacher, t, cond = nets["net"], nets["teacher"], batch["t"], batch["cond"]
    same_meaning(teacher, net, "roles.teacher")
    x_t = flow_matching.noisy(net, batch)
    of_data = {k: v for k, v in cond.items() if k != "guidance"}
    guided = jax.lax.stop_gradient(cfg(teacher, cond["guidance"])(x_t, t, of_data))
    return flow_matching.weighted(net, t, net(x_t, t, cond, key), guided, weight)


OBJECTIVE = Objective({"net": "trained", "teacher": "frozen"}, (Player("net", loss),), rollout, conditions={"guidance": ()})
