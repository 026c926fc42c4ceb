"""Groups: several samples of one condition, judged by a reward and compared with each other.

Each K neighbouring rows of the global batch are a group, whatever devices they lie on. All that compares rows happens in the
rollout, which sees the whole batch; a loss finds each row's advantage in the batch and may take the rows in slices.
"""

import jax.numpy as jnp

from flowjax import rewards, samplers, times
from flowjax.config import ConfigError, keywords
from flowjax.objectives.base import mean_dims

JUDGES = tuple(rewards.JUDGES.values())  # what roles.reward may be


def check(size: int, n: int):
    """ConfigError unless n rows fall into groups of `size` > 1."""
    if size < 2 or n % size:
        raise ConfigError(f"objective.group = {size}: samples are compared in groups of at least 2, which divide the {n} rows of a batch")


def first(cond, size: int):
    """Every row's condition replaced by that of the first of its group."""
    return {k: jnp.repeat(v[::size], size, axis=0) for k, v in cond.items()}


def judged(nets, x, cond, reward):
    """(weighted sum (B,), {name: (B,)}) of the rewards of samples x, which roles.vae decodes where it takes part."""
    images = nets["vae"].decode(x) if "vae" in nets else x
    return rewards.score(reward, images, cond.get("label"), nets.get("reward"), cond=cond)


def drawn(nets, role: str, batch, keys, reward, size: int, steps: int, sampler, grid):
    """(cond, samples, their rewards as of `judged`): groups that the network of `role` draws, one sample a row of the batch.

    keys: of the noise at the start, and of the sampler. reward, steps, sampler, grid: settings of an objective.
    """
    net, (n, *shape) = nets[role], batch["x"].shape
    check(size, n)
    at = times.grid(steps, net.path, prediction=net.prediction, **keywords(grid))
    cond = first(batch["cond"], size)
    begin = samplers.noise(net.path, keys[0], (n, *shape), at[0])
    made = samplers.sample(net, begin, keys[1], at, sampler, cond=cond)
    return cond, made, *judged(nets, made, cond, reward)


def extremes(reward, size: int, even_weights: bool = True):
    """(rows of the best, rows of the worst, weights), one of each group: the weight is 0 where all of a group score the same.

    even_weights: see `even`; else 1 where they do not. A reward that is not a number makes the weight so: the choice would mean nothing.
    """
    grouped = reward.reshape(-1, size)
    start = jnp.arange(len(grouped)) * size
    kept = jnp.where(jnp.isnan(jnp.sum(grouped, 1)), jnp.nan, 1.0 * (jnp.max(grouped, 1) > jnp.min(grouped, 1)))
    return start + jnp.argmax(grouped, 1), start + jnp.argmin(grouped, 1), even(kept) if even_weights else kept


def even(kept):
    """Weights, of mean 1 over all rows, of those that are kept (1.0 or 0.0): losses may then be means over slices."""
    return kept / jnp.maximum(jnp.mean(kept), 1e-6)


def advantages(reward, size: int, std: str = "group", limit: float = 5.0):
    """(r - mean of the group) / (standard deviation + 1e-4), clipped to +-limit, (B,).

    std: of the rewards of the "group" (Flow-GRPO's paper), or of the whole "batch" (its code): groups that hardly differ count less.
    """
    if std not in ("group", "batch"):
        raise ConfigError(f"objective.std = {std!r} is unknown; valid: group, batch")
    if limit <= 0:
        raise ConfigError(f"objective.limit = {limit} should be positive")
    grouped = reward.reshape(-1, size)
    scale = jnp.std(grouped, axis=1, keepdims=True) if std == "group" else jnp.std(reward)
    return jnp.clip((grouped - jnp.mean(grouped, axis=1, keepdims=True)) / (scale + 1e-4), -limit, limit).reshape(-1)


def spread(x, size: int):
    """Diversity: the standard deviation within the group, mean over dimensions, (B,), the same for all of a group."""
    return jnp.repeat(mean_dims(jnp.std(x.reshape(-1, size, *x.shape[1:]), axis=1)), size)


def metrics(total, each):
    """The means of what `judged` returns; of each reward, where there are several."""
    return {"reward": jnp.mean(total)} | {f"reward/{k}": jnp.mean(v) for k, v in each.items() if len(each) > 1}


def told(batch):
    """Metrics of what was rolled out: the rewards, and the diversity within groups."""
    return {**metrics(batch["reward"], batch["rewards"]), "diversity": jnp.mean(batch["spread"])}
