"""REPA: flow matching whose hidden tokens are aligned with those of a frozen encoder of the clean image (2410.06940, eq. 8).

    L = L_flow_matching - align mean_{batch, tokens} cos(f(x), h(H)),     f the encoder, H a hidden state, h the net's projector

With `stop`, the alignment ends at that step (HASTE, 2505.16792: late in training a frozen teacher holds the student back), and
the encoder is not run any more. HASTE aligns, until then, attention as well (`attention`, its weight; 0.5 there):

    + attention mean_{layers, heads, batch, queries} CE(softmax(l_encoder), softmax(l_net)),     l = q k^T / sqrt(head_dim)

between `layers` of the net (counted from 1; 5 to 8 of a SiT there) and as many `encoder_layers` (9 to 12 of a DINOv2-B), over the
tokens of the image alone, for as many heads as both have. For that the two have to cut the image into the same grid. iREPA
(2512.10794) is `target` "spatial_norm" with model.projector.conv. The encoder's tokens stand on another grid where patches differ in
size; they are then interpolated to the net's.
"""

import math

import jax
import jax.numpy as jnp

from flowjax import config
from flowjax.config import ConfigError
from flowjax.models import attention as attention_lib
from flowjax.objectives import flow_matching
from flowjax.objectives.base import Objective, Player


def spatial_norm(y, gamma: float = 1.0):
    """(y - gamma mean) / (std + 1e-6) over the places, for each channel: what differs between places, less what they share."""
    return (y - gamma * jnp.mean(y, axis=(1, 2), keepdims=True)) / (jnp.std(y, axis=(1, 2), keepdims=True) + 1e-6)


TARGETS = {"tokens": lambda y: y, "spatial_norm": spatial_norm}


def features(encoder, image, resize: float = 1.0, target="tokens", layers: tuple[int, ...] = ()):
    """Targets (B, rows, columns, F) of images (B, H, W, C): the encoder's tokens on their grid; with `layers` the pair of them and
    {"q", "k"} (B, layers, rows * columns, heads, head_dim) of its attention in these layers, without class token and registers."""
    batch, height, width, channels = image.shape
    if resize != 1.0:
        image = jax.image.resize(image, (batch, round(resize * height), round(resize * width), channels), "cubic")
    if layers:
        (tokens, _), state = encoder(image, mutable=[attention_lib.SEEN])
    else:
        tokens, _ = encoder(image)
    count = tokens.shape[1]
    rows = max(1, round(math.sqrt(count * height / width)))
    if count % rows:
        raise ConfigError(f"roles.encoder: {count} tokens of an image of {height} x {width} form no grid")
    y = tokens.reshape(batch, rows, count // rows, -1)
    y = config.build(TARGETS, target, "objective.target", y=y)
    return (y, _chosen(state, layers, slice(-count, None), "objective.encoder_layers")) if layers else y


def _chosen(state, layers, tokens: slice, where: str):
    """{"q", "k"} (B, layers, N, heads, head_dim) of a network's attention, of some layers and tokens."""
    found = attention_lib.seen(state[attention_lib.SEEN])
    if not all(1 <= layer <= len(found) for layer in layers):
        raise ConfigError(f"{where} = {tuple(layers)}: this network has layers 1 to {len(found)}")
    stacked = (jnp.stack([found[layer - 1][i][:, tokens] for layer in layers], axis=1) for i in range(2))
    return dict(zip(("q", "k"), stacked, strict=True))


def attention_term(student, teacher):
    """Mean cross-entropy () of the student's attention to the teacher's, each {"q", "k"} (B, layers, N, heads, head_dim)."""

    def logits(one):
        q, k = (one[name][..., :heads, :].astype(jnp.float32) for name in ("q", "k"))
        return jnp.einsum("blnhd,blmhd->blhnm", q, k) * q.shape[-1] ** -0.5

    heads = min(student["q"].shape[3], teacher["q"].shape[3])
    return -jnp.mean(jnp.sum(jax.nn.softmax(logits(teacher)) * jax.nn.log_softmax(logits(student)), axis=-1))


def rollout(
    nets, batch, key, *, time="uniform", label_drop: float = 0.0, resize: float = 1.0, target="tokens", stop: int = 0,
    encoder_layers: tuple = (),
):  # fmt: skip
    """What flow_matching draws, and the targets; batch["image"] holds the pixels where x are latents.

    resize: of the image before the encoder; 0.875 gives an encoder with patches of 14 the grid of latents with 16 pixels a token.
    """
    batch = flow_matching.rollout(nets, batch, key, time=time, label_drop=label_drop)
    image = batch.pop("image", batch["x"])

    def encode():
        found = features(nets["encoder"], image, resize, target, encoder_layers)
        return dict(zip(("features", "looks"), found)) if encoder_layers else {"features": found}

    def rest():
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(encode))

    return {**batch, **(jax.lax.cond(batch["step"] < stop, encode, rest) if stop else encode())}


def cosine(a, b):
    """Of the last axes, 0 where one of the two vectors is."""
    a, b = (v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in (a, b))
    one, other = (jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(v), axis=-1), 1e-24)) for v in (a, b))
    return jnp.sum(a * b, axis=-1) * one * other


def loss(
    nets, batch, key, *, weight="none", align: float = 0.5, stop: int = 0, attention: float = 0.0, layers: tuple = (),
    encoder_layers: tuple = (),
):  # fmt: skip
    """Flow matching's loss and the alignment, whose metric is the mean cosine (and the cross-entropy of the attention)."""
    if not bool(attention) == bool(layers) == bool(encoder_layers) or len(layers) != len(encoder_layers):
        told = f"{attention}, layers = {tuple(layers)} and encoder_layers = {tuple(encoder_layers)}"
        raise ConfigError(f"objective.attention = {told} go together, a layer of the encoder for each of the net's: all or none of them")
    net = nets["net"]
    if net.project is None:
        raise ConfigError("objective repa needs model.projector, a section such as {'layer': 8, 'features': 768}")
    seeing = {"mutable": [attention_lib.SEEN]} if attention else {}
    output = net.project(flow_matching.noisy(net, batch), batch["t"], batch["cond"], key, **seeing)
    (output, guess), state = output if attention else (output, None)
    value, metrics = flow_matching.regression(net, batch, output, weight)

    y = batch["features"]
    if guess.shape[-1] != y.shape[-1]:
        raise ConfigError(f"model.projector.features = {guess.shape[-1]}, but the encoder's tokens have {y.shape[-1]}")
    if guess.shape != y.shape:
        y = jax.image.resize(y, guess.shape, "linear")
    alignment = jnp.mean(cosine(guess, y))
    on = jnp.where(batch["step"] < stop, 1.0, 0.0) if stop else 1.0
    value, metrics = value - on * align * alignment, {**metrics, "alignment": alignment}
    if not attention:
        return value, metrics
    count, theirs = guess.shape[1] * guess.shape[2], batch["looks"]["q"].shape[2]
    if count != theirs:
        raise ConfigError(f"objective.attention compares token by token: the net has {count}, the encoder {theirs}; objective.resize or patches")
    apart = attention_term(_chosen(state, layers, slice(0, count), "objective.layers"), batch["looks"])
    return value + on * attention * apart, {**metrics, "attention": apart}


OBJECTIVE = Objective({"net": "trained", "encoder": "frozen"}, (Player("net", loss),), rollout, {"encoder": "image_encoder"})
