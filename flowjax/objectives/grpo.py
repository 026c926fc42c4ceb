"""Flow-GRPO (2505.05470) on any path and prediction, with MixGRPO's window (2507.21802) and Flow-GRPO-Fast's branches.

K samples of each condition are drawn by the SDE sampler with diffusion "flow_grpo" (flowjax.samplers.sde), of Gaussian steps:

    x_s ~ N(mu(x_t), std^2),    A = (R - mean of the group) / (std of the group + 1e-4)
    log r = mean over dimensions of  log N(x_s; mu, std^2) - log N(x_s; mu_old, std^2)
    L = mean max(-A r, -A clip(r, 1 - clip, 1 + clip)) + beta KL,    KL = mean over dimensions of (mu - mu_ref)^2 / (2 std^2)

mu_old is the network's when the step of training began: with roles.net.updates = n the samples are used for n updates, each on a
slice of them, and only the first is exactly on policy. The noise is in a window of consecutive steps, and only those are trained;
elsewhere the ODE is followed, always in the last step, whose noise nothing would remove. A window that moves on is MixGRPO; one of a
step or two at random places, with `shared` noise, Flow-GRPO-Fast: a group is one trajectory until it branches.

The mean over dimensions is the authors' code's; the ratio of densities is that of the sum (`reduce`). So `clip` goes with the number
of dimensions, theirs (1e-4) with 65,536: for D take 1e-4 times 65,536 / D. Their code's KL lacks the step's length: its beta of 0.04
at ten steps is 0.004 here. Nothing is guided, and dropout is off, so that the policy of the rollout is the one that is trained.
"""

import jax
import jax.numpy as jnp

from flowjax import samplers, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives import groups
from flowjax.objectives.base import Objective, Player, mean_dims, same_meaning
from flowjax.paths import expand
from flowjax.samplers import sde
from flowjax.samplers.base import fold_in, normal


def transition(net, x, t, s, noise):
    """Mean and standard deviation of the policy's step from t to s; noise: Flow-GRPO's a, 0 for the ODE."""
    return sde.transition(net, x, t, s, "flow_grpo", noise**2 / 2)


def rollout(
    nets, batch, key, *, reward, group: int = 8, steps: int = 10, grid="uniform", noise: float = 0.7, window: int = 0,
    move: int = 0, shared: bool = False, std: str = "group", limit: float = 5.0,
):  # fmt: skip
    """Draw the samples, judge them, and keep the W transitions that have noise, (B, W, ...).

    reward: a section of flowjax.rewards. group: K. steps, grid: those of sampling. noise: a of sigma_t = a sqrt(t / (1 - t)).
    window: its length W; 0 for all steps but the last. move: steps of training after which it moves on by one (from the last place
    to the first); 0 draws its place anew in each. shared: whether a group begins with one noise. std, limit: of the advantages
    (objectives.groups).
    """
    net, (n, *shape) = nets["net"], batch["x"].shape
    same_meaning(nets["reference"], net, "roles.reference", ("path",))
    groups.check(group, n)
    count = window or steps - 1
    if not 1 <= count < steps:
        raise ConfigError(f"objective.window = {window} of objective.steps = {steps}: noise is in one step or more, never in the last")
    if noise <= 0:
        raise ConfigError(f"objective.noise = {noise} should be positive: without noise there are no probabilities")
    if move < 0 or (move and count == steps - 1):
        raise ConfigError(f"objective.move = {move} should be at least 0, and 0 where objective.window = {window} leaves no place to move to")
    at = jnp.asarray(times.grid(steps, net.path, prediction=net.prediction, **keywords(grid)), jnp.float32)
    key_start, key_walk, key_place = jax.random.split(key, 3)
    places = steps - count
    start = batch["step"] // move % places if move else jax.random.randint(key_place, (), 0, places)
    cond = groups.first(batch["cond"], group)
    model = net.bind(cond)

    def walk(x, step):
        i, t, s = step
        mean, std = transition(model, x, t, s, jnp.where((i >= start) & (i < start + count), noise, 0.0))
        after = mean + std * normal(fold_in(key_walk, i), x)
        return after, (x, after, mean)

    begin = samplers.noise(net.path, key_start, (n // group if shared else n, *shape), at[0])
    begin = jnp.repeat(begin, group, axis=0) if shared else begin
    made, seen = jax.lax.scan(walk, begin, (jnp.arange(steps), at[:-1], at[1:]))
    total, each = groups.judged(nets, made, cond, reward)
    part = lambda v: jax.lax.dynamic_slice_in_dim(v, start, count)  # noqa: E731
    before, after, mean = (jnp.moveaxis(part(v), 0, 1) for v in seen)
    t, s = (jnp.broadcast_to(part(v), (n, count)) for v in (at[:-1], at[1:]))
    return {
        "cond": cond, "before": before, "after": after, "mean": mean, "t": t, "s": s, "reward": total, "rewards": each,
        "advantage": groups.advantages(total, group, std, limit), "spread": groups.spread(made, group),
    }  # fmt: skip


def loss(nets, batch, key, *, noise: float = 0.7, clip: float = 1e-4, beta: float = 0.004, reduce: str = "mean"):
    """Clipped policy loss with the KL to the reference; reduce: "mean" or "sum" over dimensions, of log-ratio and KL.

    Metrics: those of the samples, ratio (mean), clipped (share of the transitions whose ratio is outside the bounds), and kl, per
    sample: always the sum over dimensions and trained steps.
    """
    del key
    if reduce not in ("mean", "sum"):
        raise ConfigError(f"objective.reduce = {reduce!r} is unknown; valid: mean, sum")
    if clip <= 0 or beta < 0:
        raise ConfigError(f"objective.clip = {clip} should be positive, and objective.beta = {beta} not negative")
    count = batch["t"].shape[1]
    cond, advantage = jax.tree.map(lambda v: jnp.repeat(v, count, axis=0), (batch["cond"], batch["advantage"]))
    x, after, old, t, s = (batch[k].reshape(-1, *batch[k].shape[2:]) for k in ("before", "after", "mean", "t", "s"))
    mean, std = transition(nets["net"].bind(cond), x, t, s, noise)
    reference, _ = jax.lax.stop_gradient(transition(nets["reference"].bind(cond), x, t, s, noise))
    std = expand(std, x)
    dims = 1 if reduce == "mean" else x[0].size
    # The difference of the two log-densities, which share their std, without its cancellation.
    ratio = jnp.exp(dims * mean_dims((mean - old) * (after - (mean + old) / 2) / std**2))
    kl = mean_dims(jnp.square((mean - reference) / std) / 2)
    policy = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip))
    metrics = {
        "ratio": jnp.mean(ratio),
        "clipped": jnp.mean((jnp.abs(ratio - 1) > clip).astype(jnp.float32)),
        "kl": jnp.mean(kl) * x[0].size * count,
    }
    return jnp.mean(policy) + beta * dims * jnp.mean(kl), {**groups.told(batch), **metrics}


OBJECTIVE = Objective(
    {"net": "trained", "reference": "frozen", "reward": "optional"}, (Player("net", loss),), rollout,
    {"reward": groups.JUDGES}, pixels=True,
)  # fmt: skip
