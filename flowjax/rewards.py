"""Rewards: what post-training asks of an image; higher is better.

    reward(images (B, H, W, C) in [-1, 1], labels (B,), cond, judge) -> (B,)        each takes of these what it needs

All are differentiable almost everywhere, and the same functions measure what a method has achieved (flowjax.evals.rewards). `score`
takes a name, or {name: weight} of several: what is asked for is their weighted sum, and one of weight 0 is measured only.
"""

import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flowjax.config import ConfigError, arguments, lookup


def _brightness(images):
    return (images + 1) / 2


def ink(images):
    """Stroke mass: mean brightness in [0, 1]."""
    return jnp.mean(_brightness(images), axis=(1, 2, 3))


def upper(images):
    """Share of the brightness in the upper half, which has half of the middle row where their number is odd; 0.5 for an empty image."""
    rows = jnp.sum(_brightness(images), axis=(2, 3))
    total = jnp.sum(rows, axis=1)
    drawn, half = total > 0, rows.shape[1] // 2
    above = jnp.sum(rows[:, :half], axis=1) + (0.5 * rows[:, half] if rows.shape[1] % 2 else 0.0)
    return jnp.where(drawn, above / jnp.where(drawn, total, 1.0), 0.5)


def symmetry(images):
    """1 - the mean difference in brightness between an image and its mirror image: 1 where left and right are alike."""
    return 1 - jnp.mean(jnp.abs(images - images[:, :, ::-1]), axis=(1, 2, 3)) / 2


def _colour(channel):
    def reward(images):
        if images.shape[-1] != 3:
            raise ConfigError(f"a reward of colour needs images of 3 channels, and these have {images.shape[-1]}")
        mean = jnp.mean(_brightness(images), axis=(1, 2))
        return 1.5 * mean[:, channel] - 0.5 * jnp.sum(mean, axis=1)

    reward.__doc__ = f"Mean of channel {channel} less the mean of the two others, in [-1, 1]."
    return reward


def agreement(images, labels, judge):
    """log p(label | image) of a classifier (models.classifier), asked at t = 0 where it knows times; NaN for a class it lacks."""
    if labels is None:
        raise ConfigError("reward 'agreement' compares with the asked class, and the data has no labels")
    t = jnp.zeros(len(images), jnp.float32) if judge.module.time else None
    log_p = jax.nn.log_softmax(judge(images, t=t))
    return jnp.take_along_axis(log_p, labels[:, None], axis=1, mode="fill", fill_value=jnp.nan)[:, 0]


def model(images, cond, judge):
    """What a reward model (models.reward, objective reward_model) says. Only differences within one condition mean something: its
    zero is arbitrary, so that a margin (ReFL) has to be found on samples of the reference."""
    return judge(images, cond)


REWARDS = {
    "ink": ink,
    "upper": upper,
    "symmetry": symmetry,
    "red": _colour(0),
    "green": _colour(1),
    "blue": _colour(2),
    "agreement": agreement,
    "model": model,
}
JUDGES = {"agreement": "classifier", "model": "reward"}  # the kind of network that a reward asks


def weights(section, where: str = "objective.reward") -> dict[str, float]:
    """{name: weight} of a section, which is a name or such a mapping; ConfigError unless something is asked for."""
    section = {section: 1.0} if isinstance(section, str) else section
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} = {section!r} should be a name, or {{name: weight, ...}}; names: {', '.join(sorted(REWARDS))}")
    for name, weight in section.items():
        lookup(REWARDS, name, where)
        if not isinstance(weight, numbers.Real) or isinstance(weight, bool):
            raise ConfigError(f"{where}.{name} = {weight!r} should be a number, the weight of this reward")
    if not any(section.values()):
        raise ConfigError(f"{where} = {dict(section)!r} asks for nothing: one weight at least should not be 0")
    return {name: float(weight) for name, weight in section.items()}


def score(section, images, labels=None, judge=None, where: str = "objective.reward", cond=None):
    """(weighted sum (B,), {name: (B,)}) of the rewards of a section, float32 or wider.

    judge: the callable of a classifier or a reward model, which roles.reward supplies. cond: all that was asked for, for a reward
    model; by default the labels. Images are clipped to [-1, 1], as they are when they are stored: what a model overshoots earns
    nothing. ConfigError where a reward lacks something, or where nobody asks the judge.
    """
    asked = weights(section, where)
    if images.ndim != 4:
        raise ConfigError(f"{where}: rewards look at images (B, H, W, C), and these samples have the shape {images.shape}")
    images = jnp.clip(images.astype(jnp.promote_types(images.dtype, jnp.float32)), -1.0, 1.0)
    cond = cond if cond is not None else {} if labels is None else {"label": labels}
    known, each = {"images": images, "labels": labels, "judge": judge, "cond": cond}, {}
    for name in asked:
        needed = arguments(REWARDS[name])
        if "judge" in needed and judge is None:
            raise ConfigError(f"{where}: {name!r} asks a {JUDGES[name]}: roles.reward.checkpoint, or --reward_checkpoint")
        if "judge" in needed and judge.module.kind != JUDGES[name]:
            raise ConfigError(f"{where}: {name!r} asks a {JUDGES[name]}, and the network that is given is a {judge.module.kind}")
        each[name] = REWARDS[name](**{k: known[k] for k in needed})
        if each[name].shape != images.shape[:1]:
            raise ConfigError(f"{where}: {name!r} gave shape {each[name].shape} for {len(images)} images; it should be ({len(images)},)")
    if judge is not None and not any("judge" in arguments(REWARDS[name]) for name in asked):
        raise ConfigError(f"roles.reward takes no part in {where} = {section!r}; of the rewards, {' and '.join(map(repr, JUDGES))} ask one")
    # Those of weight 0 take no part: 0 times what is not a number would not be 0, nor its gradient.
    return sum(weight * each[name] for name, weight in asked.items() if weight), each
