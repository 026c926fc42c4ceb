"""DiffusionNFT (2509.16117): reinforcement learning on the forward process, without probabilities and with any sampler.

K samples x of each condition are drawn with `old`, an average of the network (ema.old, "ramp"), judged, and learned from:

    r = 1/2 + A / (2 limit) in [0, 1],   A the advantage in the group, clipped to +-limit
    x_t = a x + b z;   y+ = (1 - beta) y_old + beta y_net,   y- = (1 + beta) y_old - beta y_net
    L = r |y+ - y|^2 + (1 - r) |y- - y|^2  (+ anchor mean_dims |v - v_ref|^2)

whose optimum at every x_t is y_old + (1 / beta) E[(2 r - 1) (y - y_old) | x_t]: towards good samples and away from bad ones. Without
the second term rewards collapse (the paper's section 4.4). y is the velocity; with `normalise`, as in the authors' code, it is x, and
each square is divided by the mean of |y+ - x|, or of |y- - x|, over dimensions. They multiply the loss by 5 / beta, which we leave
out: their anchor of 1e-4 is 2e-5 beta here. Dropout is off, and nothing is guided.
"""

import jax
import jax.numpy as jnp

from flowjax import predictions, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives import groups
from flowjax.objectives.base import Objective, Player, mean_dims, same_meaning


def rollout(
    nets, batch, key, *, reward, group: int = 8, steps: int = 10, sampler="euler", grid="uniform", std: str = "batch",
    limit: float = 5.0, draws: int = 1, time="uniform",
):  # fmt: skip
    """Draw and judge the samples, and `draws` times and noises (B, draws, ...) for each of them.

    reward: a section of flowjax.rewards. group: K. steps, sampler, grid: of sampling. std, limit: of the advantages
    (objectives.groups). time: a section of flowjax.times.
    """
    old, (n, *shape) = nets["old"], batch["x"].shape
    if draws < 1:
        raise ConfigError(f"objective.draws = {draws} should be at least 1")
    key_start, key_walk, key_t, key_z = jax.random.split(key, 4)
    cond, made, total, each = groups.drawn(nets, "old", batch, (key_start, key_walk), reward, group, steps, sampler, grid)
    return {
        "cond": cond, "x": made, "reward": total, "rewards": each, "spread": groups.spread(made, group),
        "good": 0.5 + groups.advantages(total, group, std, limit) / (2 * limit),
        "t": times.draw(key_t, n * draws, old.path, prediction=old.prediction, **keywords(time)).reshape(n, draws),
        "z": jax.random.normal(key_z, (n, draws, *shape), made.dtype),
    }  # fmt: skip


def loss(nets, batch, key, *, beta: float = 1.0, normalise: bool = True, anchor: float = 0.0):
    """The two-sided regression. Metrics: those of the samples, lag (the mean square of y_net - y_old), and drift (that of v_net - v_ref,
    where there is a reference)."""
    del key
    if beta <= 0 or anchor < 0:
        raise ConfigError(f"objective.beta = {beta} should be positive, and objective.anchor = {anchor} not negative")
    if bool(anchor) != ("reference" in nets):
        raise ConfigError(f"objective.anchor = {anchor}: above 0 it needs roles.reference, which takes no part otherwise")
    net, draws = nets["net"], batch["t"].shape[1]
    cond, x, good = jax.tree.map(lambda v: jnp.repeat(v, draws, axis=0), (batch["cond"], batch["x"], batch["good"]))
    t, z = batch["t"].reshape(-1), batch["z"].reshape(x.shape)
    kind = "x" if normalise else "velocity"
    x_t, y = net.path.perturb(x, z, t), predictions.target(net.path, kind, x, z, t)
    new, old = net.get(kind, x_t, t, cond), jax.lax.stop_gradient(nets["old"].get(kind, x_t, t, cond))

    def error(guess):
        square = mean_dims(jnp.square(guess - y))
        return square / jnp.maximum(jax.lax.stop_gradient(mean_dims(jnp.abs(guess - y))), 1e-5) if normalise else square

    plus, minus = (1 - beta) * old + beta * new, (1 + beta) * old - beta * new
    value = jnp.mean(good * error(plus) + (1 - good) * error(minus))
    metrics = {**groups.told(batch), "lag": jnp.mean(mean_dims(jnp.square(new - old)))}
    if anchor:
        same_meaning(nets["reference"], net, "roles.reference", ("path",))
        ours, other = net.get("velocity", x_t, t, cond), nets["reference"].get("velocity", x_t, t, cond)
        drift = jnp.mean(mean_dims(jnp.square(ours - jax.lax.stop_gradient(other))))
        value, metrics["drift"] = value + anchor * drift, drift
    return value, metrics


OBJECTIVE = Objective(
    {"net": "trained", "old": "ema:net", "reference": "optional", "reward": "optional"}, (Player("net", loss),), rollout,
    {"reference": "denoiser", "reward": groups.JUDGES}, pixels=True,
)  # fmt: skip
