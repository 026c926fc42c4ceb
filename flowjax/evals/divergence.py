"""How far a network has gone from another: the divergence of their samplers' trajectories, in nats.

Along an SDE both networks make Gaussian steps of the same standard deviation, so that the divergence of the whole trajectories is the
expectation, under the first, of the sum of |mu - mu_ref|^2 / (2 std^2) over the steps (Girsanov's theorem in discrete time). It bounds
from above that of the states which the last noise leads to, and only the states are drawn: the steps' own divergences are exact. This is
Flow-GRPO's KL (2505.05470), summed over dimensions and over all steps but the last, which has no noise; here for networks that were
trained in any way. What two networks do otherwise in that last step alone is not seen, and of samples that another sampler draws from
them it bounds nothing.
"""

import jax
import jax.numpy as jnp

from flowjax.samplers import sde
from flowjax.samplers.base import fold_in, normal


def path_kl(net, reference, begin, key, times, noise: float = 0.7):
    """(B,) KL of net's trajectories to reference's from the states begin (B, ...) at times[0]; both are bound to their conditions.

    key: one key, or (B,) keys. times: N + 1 times from noise to data. noise: a of sigma_t = a sqrt(t / (1 - t)), Flow-GRPO's SDE.
    """
    at = jnp.asarray(times, begin.dtype)

    def walk(carry, step):
        (x, total), (i, t, s) = carry, step
        mean, std = sde.transition(net, x, t, s, "flow_grpo", noise**2 / 2)
        other, _ = sde.transition(reference, x, t, s, "flow_grpo", noise**2 / 2)
        total = total + jnp.sum(jnp.square((mean - other) / std), axis=tuple(range(1, x.ndim))) / 2
        return (mean + std * normal(fold_in(key, i), x), total), None

    steps = jnp.arange(len(at) - 2), at[:-2], at[1:-1]
    (_, total), _ = jax.lax.scan(walk, (begin, jnp.zeros(len(begin), begin.dtype)), steps)
    return total
