"""Next-token prediction: the cross-entropy of a causal language model, over all of a text or over what follows a prefix.

    loss = - sum over learned tokens of log p(token_i | token_<i) / their number in the whole batch

A row holds texts, each of which ends with token 0 (flowjax.models.language); `prefix` of them are given and what is learned is the next
one, its end included. The first token of a row has none before it and is not learned.
"""

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.objectives.base import Objective, Player

END = 0


def learned(tokens, prefix: int):
    """bool (B, L - 1): which of tokens[:, 1:] belong to text number `prefix` of their row, or end it."""
    return jnp.cumsum(tokens[:, :-1] == END, axis=1) == prefix


def measure(nets, batch, key, *, prefix: int = 0):
    """How many tokens of a row are learned, on average: over rows of different length the mean is not one over slices."""
    del nets, key
    return jnp.mean(jnp.sum(learned(batch["x"], prefix), axis=1).astype(jnp.float32))


def loss(nets, batch, key, *, prefix: int = 0):
    """Mean cross-entropy of the learned tokens, in nats; metric `accuracy`."""
    del key
    if prefix < 0:
        raise ConfigError(f"objective.prefix = {prefix} should be a number of texts, at least 0")
    tokens = batch["x"]
    mine = learned(tokens, prefix)
    logits = nets["net"](tokens)[:, :-1]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
    mean = lambda v: jnp.mean(jnp.sum(jnp.where(mine, v, 0.0), axis=1)) / batch["measured"]  # noqa: E731
    return -mean(log_p), {"accuracy": mean(jnp.argmax(logits, axis=2) == tokens[:, 1:])}


OBJECTIVE = Objective({"net": "trained"}, (Player("net", loss, measure=measure),), kinds={"net": "language_model"})
