"""Objectives: one file per method, one line per method in OBJECTIVES.

An objective declares its roles (who takes part), its players (who is trained, by which loss, how often) and, where it
makes data without gradients first, its rollout. Losses are pure:

    rollout(nets, batch, key, **settings) -> batch            times, noise, dropped labels, trajectories: the whole global batch
    loss(nets, batch, key, **settings) -> (scalar, metrics)   may see a slice of that batch; key is for dropout only

`nets` maps a role to a callable closed over its parameters. Because all randomness that the loss depends on is drawn in
the rollout, accumulating gradients over slices equals the large batch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flowjax import config
from flowjax.objectives import add, classification, consistency, contrastive, dmd, dpo, flow_map, flow_matching, grpo, guidance_distillation
from flowjax.objectives import imm, language_model, lcm, mae, moment, nft, online_dpo, progressive, repa, reward_feedback, reward_model, scm, stepwise, vae
from flowjax.objectives.base import GIVEN, Objective, Player

OBJECTIVES: dict[str, Objective] = {
    "flow_matching": flow_matching.OBJECTIVE,
    "repa": repa.OBJECTIVE,
    "mae": mae.OBJECTIVE,
    "consistency_distillation": consistency.DISTILLATION,
    "consistency_training": consistency.TRAINING,
    "latent_consistency": lcm.OBJECTIVE,
    "scm_distillation": scm.DISTILLATION,
    "scm_training": scm.TRAINING,
    "guidance_distillation": guidance_distillation.OBJECTIVE,
    "progressive_distillation": progressive.OBJECTIVE,
    "guided_progressive_distillation": progressive.GUIDED,
    "distribution_matching": dmd.OBJECTIVE,
    "distribution_matching_gan": dmd.GAN,
    "adversarial_distillation": add.OBJECTIVE,
    "moment_matching": moment.OBJECTIVE,
    "parameter_moment_matching": moment.PARAMETERS,
    "inductive_moment_matching": imm.OBJECTIVE,
    "meanflow": flow_map.MEANFLOW,
    "shortcut": flow_map.SHORTCUT,
    "reward_model": reward_model.OBJECTIVE,
    "diffusion_dpo": dpo.OBJECTIVE,
    "diffusion_kto": dpo.KTO,
    "online_dpo": online_dpo.OBJECTIVE,
    "stepwise_preference": stepwise.OBJECTIVE,
    "flow_grpo": grpo.OBJECTIVE,
    "reward_feedback": reward_feedback.OBJECTIVE,
    "diffusion_nft": nft.OBJECTIVE,
    "vae": vae.OBJECTIVE,
    "vae_gan": vae.GAN,
    "classification": classification.OBJECTIVE,
    "contrastive": contrastive.OBJECTIVE,
    "language_model": language_model.OBJECTIVE,
}


class BoundObjective(NamedTuple):
    """An objective with its settings filled in: what the train step takes."""

    roles: Mapping[str, str]
    players: tuple[Player, ...]
    rollout: Callable
    kinds: Mapping[str, str | tuple[str, ...]] = {}
    whole: bool = False
    coupled: bool = False
    conditions: Mapping[str, tuple[int, ...]] = {}
    shared: bool = False
    reads: Mapping[str, str] = {}
    pixels: bool = False
    judged: bool = False


def bind(objective: Objective, settings: Mapping, where: str = "objective") -> BoundObjective:
    """Fill settings into every function that names them; ConfigError when a key is named by none of them."""
    functions = [fn for p in objective.players for fn in (p.loss, p.measure)] + [objective.rollout]
    valid = {k: None for fn in functions if fn for k in config.arguments(fn, GIVEN)}
    for key in settings:
        if key not in valid:
            raise config.ConfigError(f"{where}.{key} is unknown; valid: {', '.join(valid)}")

    def fill(fn):
        names = config.arguments(fn, GIVEN)
        return functools.partial(fn, **config.check(fn, {k: v for k, v in settings.items() if k in names}, where, GIVEN))

    players = tuple(p._replace(loss=fill(p.loss), measure=p.measure and fill(p.measure)) for p in objective.players)
    rollout = fill(objective.rollout) if objective.rollout else lambda nets, batch, key: batch
    return BoundObjective(**objective._asdict() | {"players": players, "rollout": rollout})


def build(section, where: str = "objective") -> BoundObjective:
    """The objective that a config section selects, with its settings checked."""
    name, settings = config.split(section, where)
    return bind(config.lookup(OBJECTIVES, name, f"{where}.name"), settings, where)
