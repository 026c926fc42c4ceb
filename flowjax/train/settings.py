"""The settings of a run: every top-level key with its default, checked before anything starts.

configs/*.py start from `defaults()` and fill in the rest. Sections that select something ({"name": ..., ...}) are checked
against what they select when it is built; the others are checked here, against the signatures below.
"""

import json
from collections.abc import Mapping

from flowjax.config import ConfigError, arguments, check


def mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1):
    """Mesh sizes; -1 is "what is left"."""


def logging(every: int = 50, tensorboard: bool = True, progress: bool = True):
    """Rows of metrics.jsonl every so many steps; TensorBoard files; the progress line."""


def checkpoint(every: int = 1000, keep: int = 2, keep_every: int = 0, best: str = ""):
    """Save every so many steps (and at the end); what is kept; `best` names a metric to minimise ("" = none)."""


def validation(every: int = 0, batches: int = 4, split: str = "test"):
    """Loss of the averaged weights on held-out batches with fixed noise and times, every so many steps (0 = never)."""


def sample(steps: int = 50, sampler="heun", grid="uniform", guidance="none", every: int = 0, count: int = 100, seed: int = 0,
           prompts=(), negative: str = ""):
    """How this run's model is sampled, and how often a picture of `count` samples is drawn while training (0 = never).

    prompts: what the pictures are asked for, in turn (else captions of the validation split); negative: a prompt to be guided
    away from, in place of no prompt.
    """


def evaluate(count: int = 1000, metrics=("frechet", "agreement"), features=("pixels",), judge="svm", batch: int = 250, seed: int = 0,
             train_split: str = "train", test_split: str = "test", labels: str = "balanced", data=""):
    """What experiments.evaluate measures (flowjax.evals), on how many samples, against which splits; data: of what section, where it
    is not the run's own (of which preferences are no images to compare with)."""


def panel(every: int = 0, count: int = 500, rewards=(), metrics=("agreement", "frechet"), steps: int = 10, sampler="heun", grid="uniform",
          guidance="none", prompts=(), noise: float = 0.7, seed: int = 0, stop={}):
    """Samples measured as training goes on (flowjax.train.panel), every so many steps (0 = never), with evaluate's features, judge,
    splits and data.

    rewards: names, () for those of the objective. steps, sampler, grid, guidance: of sampling; prompts: as in `sample`. noise: of the
    trajectories whose divergence is kl. stop: {metric: {"above": bound, "below": bound}}, beyond which the run ends.
    """


def role(checkpoint: str = "", weights: str = "ema", model=None, path=None, prediction: str = "", input_scaling=None,
         optimizer=None, every: int = 0, updates: int = 1, lora=None, average: str = "", drop=0.0):
    """Where a role's parameters come from; for a second trained role, its network and optimizer; for trained ones, their pace.

    every: an update in every so many steps (0 = as the objective has it). updates: so many in one step, in turn, each on its own
    slice of what was rolled out. lora (flowjax.train.lora): an adapter is trained of what the checkpoint holds, not all of it.
    average: of the checkpoint, a workdir, this average is what the run's own averages of a trained role go on with, as if its
    training had not ended; "" = they begin anew, at the weights that are trained. drop, of roles.text where that is several text
    encoders side by side: each one's part of a caption is left out with this probability (one number, or one for each of them),
    besides objective.label_drop, which leaves out the whole condition.
    """


SECTIONS = {
    "mesh": mesh,
    "log": logging,
    "checkpoint": checkpoint,
    "validation": validation,
    "sample": sample,
    "evaluate": evaluate,
    "panel": panel,
}

# Keys that may change between the start of a run and its resumption: they do not touch what is computed at a given step.
MAY_CHANGE = ("mesh", "rules", "log", "checkpoint", "validation", "sample", "evaluate", "panel", "steps")


def defaults() -> dict:
    """Every top-level key. None marks what a config must supply."""
    return {
        "seed": 0,
        "steps": 1000,
        "batch_size": 128,  # global
        "accumulate": 1,
        "data": None,
        "model": None,
        "path": {"name": "rectified"},
        "prediction": "velocity",
        "input_scaling": "none",
        "objective": None,
        "optimizer": None,
        "ema": {},
        "roles": {},
        "rules": {},
        **{name: {k: p.default for k, p in arguments(fn).items()} for name, fn in SECTIONS.items()},
    }


def words(arg: str, *valid: str) -> set[str]:
    """The words of a config's argument, configs/name.py:one:other; ConfigError at one that is none of `valid`."""
    found = {word for word in arg.split(":") if word}
    if unknown := sorted(found - {*valid}):
        raise ConfigError(f"the config's argument {arg!r}: {unknown[0]!r} is unknown; valid: {', '.join(valid)}")
    return found


def config_dict(**changes):
    """ml_collections.ConfigDict of the defaults with `changes`; nested dicts given here replace whole sections.

    A section in SECTIONS is merged with its defaults instead, key by key.
    """
    from ml_collections import ConfigDict

    values = defaults()
    for key, value in changes.items():
        if key not in values:
            raise ConfigError(f"config.{key} is unknown; valid: {', '.join(values)}")
        if key in SECTIONS:
            value = {**values[key], **check(SECTIONS[key], value, key)}
        values[key] = value
    # None would lock a field against command-line overrides; sections left None are dropped and asked for by `resolve`.
    return ConfigDict({k: v for k, v in values.items() if v is not None}, convert_dict=True, allow_dotted_keys=True)


# Smallest sensible values of the integers.
AT_LEAST = {
    "steps": 1, "batch_size": 1, "accumulate": 1, "log.every": 1, "checkpoint.every": 0, "checkpoint.keep": 1,
    "checkpoint.keep_every": 0, "validation.every": 0, "validation.batches": 1, "sample.steps": 1, "sample.every": 0,
    "sample.count": 1, "evaluate.count": 1, "evaluate.batch": 1, "panel.every": 0, "panel.count": 2,
    "panel.steps": 1,
}  # fmt: skip


def resolve(config) -> dict:
    """A plain nested dict with every key present; ConfigError on unknown, missing or mistyped ones."""
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    known = defaults()
    unknown = [k for k in config if k not in known]
    if unknown:
        raise ConfigError(f"config.{unknown[0]} is unknown; valid: {', '.join(known)}")
    merged = {**known, **config}
    missing = [k for k in ("data", "model", "objective", "optimizer") if merged[k] is None]
    if missing:
        raise ConfigError(f"config lacks {', '.join(missing)}")
    for name in ("ema", "roles", "rules", *SECTIONS):
        if not isinstance(merged[name], Mapping):
            raise ConfigError(f"config.{name} = {merged[name]!r} should be a section: {{key: value, ...}}")
    for name, fn in SECTIONS.items():
        merged[name] = {**known[name], **check(fn, merged[name], name)}
    if not isinstance(merged["panel"]["stop"], Mapping) or (merged["panel"]["stop"] and not merged["panel"]["every"]):
        raise ConfigError(f"config.panel.stop = {merged['panel']['stop']!r} should be a section {{metric: bounds}}, and needs panel.every > 0")
    merged["roles"] = {name: _role(name, section) for name, section in merged["roles"].items()}
    for name, wanted in (("seed", int), ("steps", int), ("batch_size", int), ("accumulate", int), ("prediction", str)):
        if not isinstance(merged[name], wanted) or isinstance(merged[name], bool):
            raise ConfigError(f"config.{name} = {merged[name]!r} should be {wanted.__name__}")
    for name, least in AT_LEAST.items():
        *section, key = name.split(".")
        value = (merged[section[0]] if section else merged)[key]
        if value is None or value < least:
            raise ConfigError(f"config.{name} = {value} should be at least {least}")
    return _unnamed(plain(merged))


def _unnamed(value):
    """{"name": "none"} is what a command line can put in place of a section; "none" is what it says."""
    if isinstance(value, dict):
        return "none" if value == {"name": "none"} else {k: _unnamed(v) for k, v in value.items()}
    return [_unnamed(v) for v in value] if isinstance(value, list) else value


def _role(name: str, section) -> dict:
    where = f"roles.{name}"
    if not isinstance(section, Mapping):
        raise ConfigError(f"config.{where} = {section!r} should be a section: {{key: value, ...}}")
    section = {**{k: p.default for k, p in arguments(role).items()}, **check(role, section, where)}
    if section["every"] < 0:
        raise ConfigError(f"config.{where}.every = {section['every']} should be at least 0")
    if section["updates"] < 1:
        raise ConfigError(f"config.{where}.updates = {section['updates']} should be at least 1")
    if section["weights"] != "ema" and not section["checkpoint"]:
        raise ConfigError(f"config.{where}.weights chooses among the weights of {where}.checkpoint, which is missing")
    if section["drop"] and name != "text":
        raise ConfigError(f"config.{where}.drop leaves out parts of captions, which only roles.text makes")
    if section["average"] and not section["checkpoint"]:
        raise ConfigError(f"config.{where}.average goes on with an average of {where}.checkpoint, which is missing")
    if section["lora"] is not None and not section["checkpoint"]:
        raise ConfigError(f"config.{where}.lora adapts the network of {where}.checkpoint, which is missing")
    return section


def plain(value):
    """JSON's own types only (tuples become lists), so that a stored config equals the live one."""
    return json.loads(json.dumps(value))


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """["model.depth: 4 -> 6", ...] of two resolved configs."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
