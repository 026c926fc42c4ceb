"""Progressive distillation from a teacher to ever fewer steps, a run for each halving.

    python -m experiments.progressive --config=configs/digits_pd.py --teacher=runs/digits --steps=16,8,4,2,1 --workdir=runs/digits_pd

The student of N steps is trained in workdir/N from that of 2 N (the first from the teacher, which takes twice its steps). The same
command goes on where it was stopped.
"""

import copy
import threading

from absl import flags
from ml_collections import config_flags

from experiments import shell
from flowjax.config import ConfigError, keywords
from flowjax.train import runtime

CONFIG = config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)
TEACHER = flags.DEFINE_string("teacher", None, "An export, or the workdir of a run.", required=True)
STEPS = flags.DEFINE_list("steps", None, "Steps of the students, in turn, each half of the one before.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
flags.mark_flag_as_required("config")


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


def main():
    runtime.setup()
    from flowjax.train import files, loop, settings

    base = settings.resolve(CONFIG.value)
    if keywords(base["objective"])["name"] != "progressive_distillation":
        raise ConfigError(f"--config has objective {base['objective']!r}, not progressive_distillation")
    counts, teacher = halvings(STEPS.value), TEACHER.value
    for n in counts:
        workdir, stop = files.path(WORKDIR.value) / str(n), threading.Event()
        loop.run(stage(base, n, teacher, n == counts[0]), workdir, stop)
        if stop.is_set():
            return 0
        teacher = str(workdir)
    return 0


if __name__ == "__main__":
    shell.run(main)
