"""Inductive moment matching (IMM), 2503.07565: a flow map from nothing, by comparing small groups of its own samples.

    groups of `particles` neighbouring rows share t > r > s;  x_t = a x + b z and x_r = a_r x + b_r z of the same x and z
    y = x_t - (t - s) u(x_t, t, t - s),   y~ = sg of the same map from x_r at r to s
    L = E omega(t) mean_ij [ k(y_i, y_j) + k(y~_i, y~_j) - 2 k(y_i, y~_j) ]                  the mean over pairs of a group
    k(p, q) = exp( -max(||p - q||, floor) / (dims (t - s)) )

u is a network of mean velocities (model.step_embed), as in MeanFlow, sampled by "flow_map"; time runs as in the paper, whose noise has
the data's deviation sigma_d, 1 here. r is the time whose noise level b/a is `gap` below t's, or s where that is lower; the paper's
gap is (eta_max - eta_min) / 2^k.

    omega = sigmoid(bias - lambda) (-lambda') / 2  a^power / (a^2 + b^2),   lambda = log(a^2 / b^2)

The terms of i = j pull y_i to y~_i, as consistency training does, whatever the size of the groups; as they get larger these weigh less
and the rest is the squared maximum mean discrepancy between the distributions of y and y~, of all labels together: beyond i = j nothing
says which label a sample should show. With by_label rows are grouped by their labels, and k counts only between rows of one label, for
the joint distribution with it. The paper does not say how its groups are made; its training code is not public.
"""

import jax
import jax.numpy as jnp

from flowjax import times
from flowjax.config import ConfigError, keywords
from flowjax.objectives.base import Objective, Player, drop_condition
from flowjax.objectives.flow_map import check
from flowjax.paths import expand


def rollout(nets, batch, key, *, particles: int = 4, time="uniform", gap: float = 0.04, label_drop: float = 0.0, by_label: bool = False):
    """Draw t, and s uniform below it, once for a group, r between them, and noise; drop labels.

    time: the law of t, a section of flowjax.times, from t_min = 0.001 to t_max = 0.994 where it does not say otherwise.
    by_label: neighbours, which become groups, have the same label wherever there are enough of it.
    """
    net, n = nets["net"], len(batch["x"])
    check(net)
    if particles < 1 or n % particles:
        raise ConfigError(f"objective.particles = {particles} should divide the batch's {n} rows")
    if by_label:
        if "label" not in batch["cond"]:
            raise ConfigError("objective.by_label needs data with labels")
        order = jnp.argsort(batch["cond"]["label"])
        batch = batch | jax.tree.map(lambda v: v[order], {k: batch[k] for k in ("x", "cond")})
    x = batch["x"]
    if not gap > 0:
        raise ConfigError(f"objective.gap = {gap} should be positive")
    key_t, key_s, key_z, key_drop = jax.random.split(key, 4)
    groups = n // particles
    law = {"t_min": 0.001, "t_max": 0.994} | keywords(time)
    t = times.draw(key_t, groups, net.path, **law)
    s = law["t_min"] + (t - law["t_min"]) * jax.random.uniform(key_s, (groups,))
    r = net.path.time_of_sigma(jnp.maximum(net.path.sigma(t) - gap, net.path.sigma(s)))
    t, r, s = (jnp.repeat(v, particles) for v in (t, jnp.clip(r, s, t), s))
    z = jax.random.normal(key_z, x.shape, x.dtype)
    return {**batch, "t": t, "r": r, "s": s, "z": z, "cond": drop_condition(net, batch["cond"], key_drop, label_drop)}


def weighting(path, t, bias: float, power: float):
    """omega of the header, with its 0 / 0 at the ends of the path multiplied out."""
    if power < 1:
        raise ConfigError(f"objective.power = {power} should be at least 1: the weight was infinite at pure noise")
    a, b, scale = path.a(t), path.b(t), jnp.exp(bias)
    return scale * b * path.wronskian(t) * a ** (power - 1) / ((a**2 + scale * b**2) * (a**2 + b**2))


def loss(nets, batch, key, *, particles: int = 4, bias: float = 4.0, power: float = 1.0, floor: float = 1e-6, by_label: bool = False):
    """IMM's loss. Metric `discrepancy`: the mean of the brackets."""
    net, x, z, t, r, s = nets["net"], *(batch[k] for k in ("x", "z", "t", "r", "s"))

    def land(t):
        # The same dropout key on both sides.
        x_t = net.path.perturb(x, z, t)
        return x_t - expand(t - s, x) * net(x_t, t, {**batch["cond"], "step": t - s}, key)

    grouped = lambda v: v.reshape(len(t) // particles, particles, -1)  # noqa: E731
    y, goal = grouped(land(t)), grouped(jax.lax.stop_gradient(land(r)))
    width = y.shape[-1] * jnp.maximum(grouped(t - s), floor)  # of each row's group
    alike = 1.0
    if by_label:
        label = grouped(batch["cond"]["label"])
        alike = label == label.swapaxes(1, 2)

    def k(p, q):
        square = jnp.sum(jnp.square(p[:, :, None] - q[:, None]), axis=-1)
        # Bounded before the root, whose derivative at 0 is infinite.
        return alike * jnp.exp(-jnp.sqrt(jnp.maximum(square, floor**2)) / width)

    value = jnp.mean(k(y, y) + k(goal, goal) - 2 * k(y, goal), axis=(1, 2))
    omega = weighting(net.path, t[::particles], bias, power)
    return jnp.mean(omega * value), {"discrepancy": jnp.mean(value)}


OBJECTIVE = Objective({"net": "trained"}, (Player("net", loss),), rollout, whole=True, conditions={"step": ()})
