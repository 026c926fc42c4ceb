"""REPA: flow matching whose hidden tokens are aligned with those of a frozen encoder of the clean image (2410.06940, eq. 8).

    L = L_flow_matching - align mean_{batch, tokens} cos(f(x), h(H)),     f the encoder, H a hidden state, h the net's projector

With `stop`, the alignment ends at that step (HASTE, 2505.16792: late in training a frozen teacher holds the student back), and
the encoder is not run any more. iREPA (2512.10794) is `target` "spatial_norm" with model.projector.conv. Its tokens stand on
another grid where patches differ in size; they are then interpolated to the net's.
"""

import math

import jax
import jax.numpy as jnp

from flowjax import config
from flowjax.config import ConfigError
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player


def spatial_norm(y, gamma: float = 1.0):
    """(y - gamma mean) / (std + 1e-6) over the places, for each channel: what differs between places, less what they share."""
    return (y - gamma * jnp.mean(y, axis=(1, 2), keepdims=True)) / (jnp.std(y, axis=(1, 2), keepdims=True) + 1e-6)


TARGETS = {"tokens": lambda y: y, "spatial_norm": spatial_norm}


def features(encoder, image, resize: float = 1.0, target="tokens"):
    """Targets (B, rows, columns, F) of images (B, H, W, C): the encoder's tokens on their grid."""
    batch, height, width, channels = image.shape
    if resize != 1.0:
        image = jax.image.resize(image, (batch, round(resize * height), round(resize * width), channels), "cubic")
    tokens, _ = encoder(image)
    count = tokens.shape[1]
    rows = max(1, round(math.sqrt(count * height / width)))
    if count % rows:
        raise ConfigError(f"roles.encoder: {count} tokens of an image of {height} x {width} form no grid")
    y = tokens.reshape(batch, rows, count // rows, -1)
    return config.build(TARGETS, target, "objective.target", y=y)


def rollout(nets, batch, key, *, time="uniform", label_drop: float = 0.0, resize: float = 1.0, target="tokens", stop: int = 0):
    """What flow_matching draws, and the targets; batch["image"] holds the pixels where x are latents.

    resize: of the image before the encoder; 0.875 gives an encoder with patches of 14 the grid of latents with 16 pixels a token.
    """
    batch = flow_matching.rollout(nets, batch, key, time=time, label_drop=label_drop)
    image = batch.pop("image", batch["x"])

    def encode():
        return features(nets["encoder"], image, resize, target)

    def rest():
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(encode))

    return {**batch, "features": jax.lax.cond(batch["step"] < stop, encode, rest) if stop else encode()}


def cosine(a, b):
    """Of the last axes, 0 where one of the two vectors is."""
    a, b = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (a, b))
    one, other = (jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(v), axis=-1), 1e-24)) for v in (a, b))
    return jnp.sum(a * b, axis=-1) * one * other


def loss(nets, batch, key, *, weight="none", align: float = 0.5, stop: int = 0):
    """Flow matching's loss and the alignment, whose metric is the mean cosine."""
    net = nets["net"]
    if net.project is None:
        raise ConfigError("objective repa needs model.projector, a section such as {'layer': 8, 'features': 768}")
    output, guess = net.project(flow_matching.noisy(net, batch), batch["t"], batch["cond"], key)
    value, metrics = flow_matching.regression(net, batch, output, weight)

    y = batch["features"]
    if guess.shape[-1] != y.shape[-1]:
        raise ConfigError(f"model.projector.features = {guess.shape[-1]}, but the encoder's tokens have {y.shape[-1]}")
    if guess.shape != y.shape:
        y = jax.image.resize(y, guess.shape, "linear")
    alignment = jnp.mean(cosine(guess, y))
    strength = jnp.where(batch["step"] < stop, align, 0.0) if stop else align
    return value - strength * alignment, {**metrics, "alignment": alignment}


OBJECTIVE = Objective({"net": "trained", "encoder": "frozen"}, (Player("net", loss),), rollout, {"encoder": "image_encoder"})
