"""Latent consistency distillation (LCM, 2310.04378): consistency over longer intervals, with the scale of guidance as an input.

    t, s = times of an N-step grid, `skip` intervals apart;  w ~ U[scale_min, scale_max];  x_t = a x + b z
    x_s = one step of the frozen teacher, guided by w, from x_t
    f(x_t, t, w) = c_skip x_t + c_out x_hat(x_t, t, w)
    L = E d( f(x_t, t, w), sg f_target(x_s, s, w) )

with x_hat the network's x-prediction, c_skip = sd^2 / ((k t)^2 + sd^2), c_out = k t / sqrt((k t)^2 + sd^2), sd = 1/2 and k = timestep_scaling.
Notation map: our w is the authors' 1 + w; their k t is 10 times a step of 1,000, which is k = 10,000 here; their intervals of 20
such steps are those of N = 50 with skip = 1, and of N = 1,000 with skip = 20 where t may be any step. c_out lacks the factor sd
of consistency models, as theirs does. From t = 1/N on, f is x_hat but for (sd N / k)^2, so sampler "renoise", which takes x_hat,
samples it.

timestep_scaling = 0 stands for f = x_hat, which predictions that are the identity at t = 0 allow. The data need not be latents.
"""

import jax
import jax.numpy as jnp

from flowjax import times
from flowjax.config import ConfigError, keywords
from flowjax.guidance import cfg
from flowjax.objectives import consistency
from flowjax.objectives.base import Objective, Player, guidance_scale, same_meaning
from flowjax.paths import expand

SIGMA_DATA = 0.5


def rollout(nets, batch, key, *, steps: int = 50, skip: int = 1, grid="uniform", scale_min: float = 3.0, scale_max: float = 15.0):
    """Draw times `skip` intervals of the `steps`-step grid apart, noise, and a scale for each example, which becomes cond["guidance"]."""
    net, teacher, n = nets["net"], nets["teacher"], len(batch["x"])
    if not 1 <= skip <= steps:
        raise ConfigError(f"objective.skip = {skip} should be from 1 to objective.steps = {steps}")
    # From where both networks determine the image.
    narrowest = min(net.prediction, teacher.prediction, key=lambda name: times.interval(net.path, name)[1])
    ascending = jnp.asarray(times.grid(steps, net.path, prediction=narrowest, **keywords(grid))[::-1], jnp.float32)
    key_i, key_z, key_w = jax.random.split(key, 3)
    i = jax.random.randint(key_i, (n,), 0, steps + 1 - skip)
    scale = guidance_scale(net, key_w, n, scale_min, scale_max)
    return {
        **batch,
        "t": ascending[i + skip], "s": ascending[i],
        "z": jax.random.normal(key_z, batch["x"].shape, batch["x"].dtype),
        "cond": {**batch["cond"], "guidance": scale},
    }  # fmt: skip


def scalings(t, timestep_scaling: float):
    """(c_skip, c_out) at t: (1, 0) at t = 0."""
    far = timestep_scaling * t
    return SIGMA_DATA**2 / (far**2 + SIGMA_DATA**2), far / jnp.sqrt(far**2 + SIGMA_DATA**2)


def loss(nets, batch, key, *, solver: str = "ddim", timestep_scaling: float = 10_000.0, metric: str = "l2", huber: float = 0.00054):
    """LCM's loss. solver: "ddim", "euler" or "heun"; metric, huber: as in consistency distillation."""
    net, teacher, t, s, cond = nets["net"], nets["teacher"], batch["t"], batch["s"], batch["cond"]
    same_meaning(teacher, net, "roles.teacher", ("path",))
    if timestep_scaling < 0:
        raise ConfigError(f"objective.timestep_scaling = {timestep_scaling} should be at least 0")
    if not timestep_scaling or net.prediction == "score":
        consistency.boundary(net)

    def f(net, x_t, t):
        # The same dropout key on both sides: otherwise the loss is not zero for equal networks at equal inputs.
        x_hat = net.get("x", x_t, t, cond, key)
        if not timestep_scaling:
            return x_hat
        skip, out = scalings(t, timestep_scaling)
        return expand(skip, x_t) * x_t + expand(out, x_t) * x_hat

    x_t = net.path.perturb(batch["x"], batch["z"], t)
    guided = cfg(teacher, cond["guidance"]).bind({k: v for k, v in cond.items() if k != "guidance"})
    x_s = consistency.ode_step(guided, x_t, t, s, solver)
    error = consistency.distance(f(net, x_t, t), jax.lax.stop_gradient(f(nets["target"], x_s, s)), metric, huber)
    return jnp.mean(error), {"distance": jnp.mean(error)}


OBJECTIVE = Objective(
    {"net": "trained", "target": "ema:net", "teacher": "frozen"}, (Player("net", loss),), rollout, conditions={"guidance": ()}
)  # fmt: skip
