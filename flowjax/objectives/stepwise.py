"""Preferences between steps, after SPO (2406.04314): candidates from the same state, the better and the worse of them a pair.

From x_t the SDE of Flow-GRPO (flowjax.objectives.grpo) draws k candidates x_s ~ N(mu(x_t), std^2). The one whose predicted x earns most
and the one whose earns least are preferred to each other, and a candidate at random goes on:

    log p_th(x_s) / p_ref(x_s) = (|x_s - mu_ref|^2 - |x_s - mu_th|^2) / (2 std^2)
    L = link(beta [that of the winner - that of the loser]) = link(beta <mu_th - mu_ref, x_w - x_l> / std^2)

<.,.> is the mean over dimensions, or their sum (`reduce`). The paper judges x_s by a model trained on noisy images; here any reward
looks at the network's own prediction of x from it. So a step is blamed for itself alone, and not for the whole trajectory. The last
step has no noise and no pair; candidates that all earn the same make none.
"""

import jax
import jax.numpy as jnp

from flowjax import samplers, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives import dpo, groups, grpo
from flowjax.objectives.base import Objective, Player, mean_dims, same_meaning
from flowjax.paths import expand
from flowjax.samplers.base import fold_in, normal


def rollout(nets, batch, key, *, reward, candidates: int = 4, steps: int = 10, grid="uniform", noise: float = 0.7):
    """Walk from noise to a sample of each row, and keep the pair of every step but the last, (B, steps - 1, ...).

    reward: a section of flowjax.rewards. candidates: k. steps, grid: those of sampling. noise: a of sigma_t = a sqrt(t / (1 - t)).
    """
    net, (n, *shape) = nets["net"], batch["x"].shape
    same_meaning(nets["reference"], net, "roles.reference", ("path",))
    if candidates < 2:
        raise ConfigError(f"objective.candidates = {candidates} should be at least 2: they are compared with each other")
    if steps < 2 or noise <= 0:
        raise ConfigError(f"objective.steps = {steps} should be at least 2 and objective.noise = {noise} positive: pairs differ by their noise")
    at = jnp.asarray(times.grid(steps, net.path, prediction=net.prediction, **keywords(grid)), jnp.float32)
    key_start, key_walk, key_pick = jax.random.split(key, 3)
    many = lambda v: jnp.repeat(v, candidates, axis=0)  # noqa: E731
    cond, conds = batch["cond"], {k: many(v) for k, v in batch["cond"].items()}
    model = net.bind(cond)

    def walk(x, step):
        i, t, s = step
        mean, std = grpo.transition(model, x, t, s, noise)
        after = many(mean) + std * normal(fold_in(key_walk, i), many(x))
        total, _ = groups.judged(nets, net.get("x", after, s, conds), conds, reward)
        best, worst, kept = groups.extremes(total, candidates, even_weights=False)
        pick = jax.random.randint(fold_in(key_pick, i), (n,), 0, candidates)
        return after[jnp.arange(n) * candidates + pick], (x, after[best], after[worst], kept)

    begin = samplers.noise(net.path, key_start, (n, *shape), at[0])
    end, seen = jax.lax.scan(walk, begin, (jnp.arange(steps - 1), at[:-2], at[1:-1]))
    made, _ = grpo.transition(model, end, at[-2], at[-1], 0.0)
    total, each = groups.judged(nets, made, cond, reward)
    before, win, lose, kept = (jnp.moveaxis(v, 0, 1) for v in seen)
    t, s = (jnp.broadcast_to(v, (n, steps - 1)) for v in (at[:-2], at[1:-1]))
    return {
        "cond": cond, "before": before, "win": win, "lose": lose, "t": t, "s": s, "weight": groups.even(kept), "reward": total, "rewards": each,
    }  # fmt: skip


def loss(nets, batch, key, *, noise: float = 0.7, beta: float = 10.0, link: str = "log_sigmoid", reduce: str = "mean"):
    """Preference loss of the steps; reduce: "mean" or "sum" over dimensions of the log-ratio.

    Metrics: reward (each of several as well), accuracy and margin as in objectives.dpo, and kl to the reference, per sample: always
    the sum over dimensions and steps.
    """
    del key
    if reduce not in ("mean", "sum"):
        raise ConfigError(f"objective.reduce = {reduce!r} is unknown; valid: mean, sum")
    if beta <= 0:
        raise ConfigError(f"objective.beta = {beta} should be positive")
    x, win, lose, t, s, weight = (batch[k].reshape(-1, *batch[k].shape[2:]) for k in ("before", "win", "lose", "t", "s", "weight"))
    count, dims = batch["t"].shape[1], x[0].size
    cond = jax.tree.map(lambda v: jnp.repeat(v, count, axis=0), batch["cond"])
    mean, std = grpo.transition(nets["net"].bind(cond), x, t, s, noise)
    reference, _ = jax.lax.stop_gradient(grpo.transition(nets["reference"].bind(cond), x, t, s, noise))
    moved, apart = (v / expand(std, x) for v in (mean - reference, win - lose))
    value, metrics = dpo.cost(link, beta * (dims if reduce == "sum" else 1) * mean_dims(moved * apart), weight)
    told = groups.metrics(batch["reward"], batch["rewards"])
    return value, {**told, **metrics, "kl": jnp.mean(jnp.square(moved)) / 2 * dims * count}


OBJECTIVE = Objective(
    {**dpo.ROLES, "reward": "optional"}, (Player("net", loss),), rollout, {"reward": groups.JUDGES}, pixels=True,
)  # fmt: skip
