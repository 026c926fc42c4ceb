"""Online DPO: Diffusion-DPO (objectives.dpo) on pairs that the network of the moment draws and a reward judges.

Of K samples of each condition the one of highest and the one of lowest reward are the pair (the DPO baseline of Flow-GRPO, 2505.05470,
whose beta is 100 with the mean over dimensions). Each pair is noised K times, so that there are as many rows as there were samples.
A group in which all score the same has no pair: it counts for nothing, where the authors' code makes one up of its first two.
"""

import jax
import jax.numpy as jnp

from flowjax.objectives import dpo, groups
from flowjax.objectives.base import Objective, Player


def rollout(nets, batch, key, *, reward, group: int = 8, steps: int = 10, sampler="euler", grid="uniform", time="uniform"):
    """Draw and judge the samples, and pair the best of each group with the worst.

    reward: a section of flowjax.rewards. group: K. steps, sampler, grid: of sampling. time: a section of flowjax.times.
    """
    key_start, key_walk, key_pair = jax.random.split(key, 3)
    cond, made, total, each = groups.drawn(nets, "net", batch, (key_start, key_walk), reward, group, steps, sampler, grid)
    best, worst, weight = groups.extremes(total, group)
    win, lose, weight = (jnp.repeat(v, group, axis=0) for v in (made[best], made[worst], weight))
    told = {"reward": total, "rewards": each, "spread": groups.spread(made, group)}
    return dpo.rollout(nets, {"win": win, "lose": lose, "cond": cond}, key_pair, time=time) | {"weight": weight, **told}


OBJECTIVE = Objective(
    {**dpo.ROLES, "reward": "optional"}, (Player("net", dpo.loss),), rollout, {"reward": groups.JUDGES}, pixels=True,
)  # fmt: skip
