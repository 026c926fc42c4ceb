"""Cross-entropy of a classifier: the feature network and judge of evaluation, or, on noisy images, the guide of sampling.

A network with `time` sees x_t = a x + b z at a drawn time and learns p(label | x_t), whose gradient is what classifier guidance
adds to the score (2105.05233 sec. 4); one without sees clean images. `shift` moves each batch by up to so many pixels.
"""

import jax
import jax.numpy as jnp
import optax

from flowjax import times
from flowjax.config import build, keywords
from flowjax.objectives.base import Objective, Player
from flowjax.paths import PATHS


def rollout(nets, batch, key, *, shift: int = 0, path="rectified", time="uniform"):
    """Shift the images; for a network with `time`, draw t (B,) and put the noisy images in their place."""
    key_shift, key_t, key_z = jax.random.split(key, 3)
    x = batch["x"]
    if shift:
        x = jnp.roll(x, jax.random.randint(key_shift, (2,), -shift, shift + 1), (1, 2))
    if not nets["net"].module.time:
        return {**batch, "x": x}
    path = build(PATHS, path if isinstance(path, dict) else {"name": path}, "objective.path")
    t = times.draw(key_t, x.shape[0], path, **keywords(time))
    return {**batch, "x": path.perturb(x, jax.random.normal(key_z, x.shape, x.dtype), t), "t": t}


def loss(nets, batch, key, *, smoothing: float = 0.0):
    """Mean cross-entropy with label smoothing; metric `accuracy`."""
    net, labels = nets["net"], batch["cond"]["label"]
    options = {} if key is None else {"train": True, "rngs": {"dropout": key}}
    logits = net(batch["x"], t=batch.get("t"), **options)
    goal = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    accuracy = jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))
    return jnp.mean(optax.softmax_cross_entropy(logits, goal)), {"accuracy": accuracy}


OBJECTIVE = Objective({"net": "trained"}, (Player("net", loss),), rollout)
