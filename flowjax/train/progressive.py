"""The chain of progressive distillation (2202.00512): a run for each halving of the steps, each taught by the one before."""

import copy
import threading
from collections.abc import Sequence

from flowjax import storage
from flowjax.config import ConfigError, keywords
from flowjax.train import loop, settings

OBJECTIVES = "progressive_distillation", "guided_progressive_distillation"


def halvings(steps: list[str]) -> list[int]:
    """The numbers of steps; ConfigError unless each is half of the one before."""
    if not steps or not all(n.isdigit() and int(n) for n in steps):
        raise ConfigError(f"--steps={','.join(steps)} should be numbers of steps")
    counts = [int(n) for n in steps]
    if wrong := [(n, m) for n, m in zip(counts, counts[1:]) if n != 2 * m]:
        raise ConfigError(f"--steps={','.join(steps)}: {wrong[0][1]} is not half of {wrong[0][0]}")
    return counts


def stage(base: dict, steps: int, teacher: str, first: bool) -> dict:
    """The config of one student."""
    config = copy.deepcopy(base)
    config["objective"] = keywords(config["objective"]) | {"steps": steps}
    if not first:  # the students before are guided already
        config["objective"].pop("guidance", None)
    for role in ("teacher", "net"):
        config["roles"][role] = {**config["roles"].get(role, {}), "checkpoint": teacher}
    config["sample"] |= {"steps": steps}
    return config


def run(config, teacher: str, steps: Sequence[str], workdir):
    """Train the students in workdir/<steps>, in turn, from where they are; a run that is asked to stop ends the chain."""
    base = settings.resolve(config)
    if keywords(base["objective"])["name"] not in OBJECTIVES:
        raise ConfigError(f"--config has objective {base['objective']!r}, not {' or '.join(OBJECTIVES)}")
    counts = halvings(list(steps))
    for n in counts:
        own, stop = storage.path(workdir) / str(n), threading.Event()
        loop.run(stage(base, n, teacher, n == counts[0]), own, stop)
        if stop.is_set():
            return
        teacher = str(own)
