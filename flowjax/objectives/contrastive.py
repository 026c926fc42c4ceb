"""Contrastive learning of images and captions (CLIP, 2103.00020 fig. 3): each image finds its caption in the batch, and back.

    logits = scale * <image_i, caption_j>;   loss = (cross-entropy over captions + cross-entropy over images) / 2

Rows of the global batch are each other's wrong answers, so a slice of it has another loss: gradients cannot be accumulated.
Captions that occur more than once in the batch are all right answers, in equal parts (with all captions different this is
CLIP's loss); n equal captions bound the loss by log n from below.
"""

import jax
import jax.numpy as jnp

from flowjax.models.sharding import constrain
from flowjax.objectives.base import Objective, Player


def loss(nets, batch, key):
    """Symmetric cross-entropy; metrics `accuracy`, of the captions that images choose, and `scale`."""
    del key
    tokens = batch["cond"]["tokens"]
    images, captions, scale = nets["net"](batch["x"], batch["cond"])
    logits = constrain(scale * images @ captions.T, "batch", None)
    right = constrain(jnp.all(tokens[:, None] == tokens[None], axis=-1), "batch", None)
    goal = right / jnp.sum(right, axis=1, keepdims=True)

    def cross_entropy(logits):
        return -jnp.mean(jnp.sum(goal * jax.nn.log_softmax(logits, axis=1), axis=1))

    # `right` is symmetric: the captions of an image are alike, and so are the images of its caption.
    value = (cross_entropy(logits) + cross_entropy(constrain(logits.T, "batch", None))) / 2
    found = jnp.take_along_axis(right, jnp.argmax(logits, axis=1)[:, None], axis=1)
    return value, {"accuracy": jnp.mean(found.astype(jnp.float32)), "scale": scale}


OBJECTIVE = Objective({"net": "trained"}, (Player("net", loss),), kinds={"net": "two_tower"}, whole=True)
