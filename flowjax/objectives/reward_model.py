"""Reward models from preferences: Plackett-Luce (1975) on rankings, of which a pair, Bradley and Terry's (1952), is the shortest.

    r_1 .. r_K    rewards of K images of one condition, the best first
    p(ranking) = prod_{i < K} exp r_i / sum_{j >= i} exp r_j;    L = -log p(ranking);    K = 2: -log sigmoid(r_win - r_lose)

A constant added to the rewards of one condition changes nothing: only differences within a condition mean something, and sigmoid
of a difference is the chance that the one image is preferred. Equal rewards give log K!.
"""

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.objectives.base import Objective, Player


def rollout(nets, batch, key):
    """Pairs are rankings of two: "ranked" (B, K, ...)."""
    if "vae" in nets:
        raise ConfigError("roles.vae takes no part in objective reward_model, which looks at images")
    if "ranked" in batch:
        return batch
    if "win" not in batch or "lose" not in batch:
        raise ConfigError("objective reward_model needs pairs or rankings (data.name = 'preferences'); the data has no win/lose and no ranked")
    return {**{k: v for k, v in batch.items() if k not in ("win", "lose")}, "ranked": jnp.stack([batch["win"], batch["lose"]], axis=1)}


def loss(nets, batch, key):
    """-log p(ranking), mean over rankings; metrics `accuracy`, of the order of pairs (ties count half), and `margin`, best less worst."""
    del key
    ranked = batch["ranked"]
    n, k = ranked.shape[:2]
    rewards = nets["net"](ranked.reshape(n * k, *ranked.shape[2:]), {name: jnp.repeat(v, k, axis=0) for name, v in batch["cond"].items()})
    if rewards.shape != (n * k,):
        raise ConfigError(f"a reward model gave shape {rewards.shape} for {n * k} images; it should be ({n * k},)")
    r = rewards.reshape(n, k)
    left = jax.lax.cumlogsumexp(r, axis=1, reverse=True)  # log sum_{j >= i} exp r_j
    better, worse = jnp.triu_indices(k, 1)
    told = {"accuracy": jnp.mean(0.5 + 0.5 * jnp.sign(r[:, better] - r[:, worse])), "margin": jnp.mean(r[:, 0] - r[:, -1])}
    return jnp.mean(jnp.sum(left - r, axis=1)), told


OBJECTIVE = Objective({"net": "trained"}, (Player("net", loss),), rollout, kinds={"net": "reward"})
