"""Flags shared by the binaries that sample, and what they select. What is not given comes from the run's config."""

import ast

import numpy as np
from absl import flags

from flowjax.config import ConfigError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "An export, or the workdir of a run.", required=True)
WEIGHTS = flags.DEFINE_string("weights", "ema", 'For a workdir: the name of an average, or "params".')
COUNT = flags.DEFINE_integer("count", 0, "How many samples; 0: as in the run's config.", lower_bound=0)
LABELS = flags.DEFINE_list("labels", [], "Classes to ask for, repeated in turn; default: all classes in turn.")
SEED = flags.DEFINE_integer("seed", -1, "Noise of sample i is a function of (seed, i); -1: as in the run's config.", lower_bound=-1)
STEPS = flags.DEFINE_integer("steps", 0, "Sampler steps; 0: as in the run's config.", lower_bound=0)
SAMPLER = flags.DEFINE_string("sampler", "", 'Name, or a section such as "{\'name\': \'ddim\', \'eta\': 1.0}".')
GRID = flags.DEFINE_string("grid", "", "Step grid: name or section.")
GUIDANCE = flags.DEFINE_string("guidance", "", 'Scale of classifier-free guidance, "none", or a section.')
BATCH = flags.DEFINE_integer("batch", 0, "Samples per call, which does not change them; 0: as in the run's config.", lower_bound=0)
SAMPLING = ("labels", "steps", "sampler", "grid", "guidance", "count", "seed")


def section(text: str, flag: str):
    """A name or a Python literal of a config section."""
    if not text.startswith("{"):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"--{flag}={text} is neither a name nor a section like {{'name': ...}}: {error}") from None


def guidance(text: str):
    """A scale, "none", or a section."""
    try:
        return {"name": "cfg", "scale": float(text)}
    except ValueError:
        return section(text, "guidance")


def options(info: dict) -> dict:
    """Sampling settings: the run's, overridden by flags."""
    from flowjax.train import generator

    chosen = generator.defaults(info)
    given = {
        "steps": STEPS.value,
        "sampler": section(SAMPLER.value, "sampler"),
        "grid": section(GRID.value, "grid"),
        "guidance": guidance(GUIDANCE.value) if GUIDANCE.value else "",
    }
    return chosen | {k: v for k, v in given.items() if v}


def asked(info: dict, count: int) -> dict:
    """cond for `count` samples."""
    from flowjax import generate

    classes = info["num_classes"] if info["model"].get("num_classes") else 0
    if not LABELS.value:
        return {"label": generate.balanced_labels(count, classes)} if classes else {}
    if not classes:
        raise ConfigError("--labels: this network has no classes")
    try:
        labels = np.array([int(v) for v in LABELS.value], np.int32)
    except ValueError:
        raise ConfigError(f"--labels={','.join(LABELS.value)} should be class numbers") from None
    if labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(f"--labels={','.join(LABELS.value)}: classes are 0 to {classes - 1}")
    return {"label": np.resize(labels, count)}
