"""Train: python -m experiments.train --config=configs/digits.py --workdir=runs/digits [--config.model.depth=6 ...]

The same command resumes. Ctrl-C or SIGTERM saves and leaves. Exit codes: 0 done or saved, 2 bad settings, 3 a loss that is
not finite.
"""

import sys

from absl import flags
from ml_collections import config_flags

from experiments import shell
from flowjax.train import runtime

# Unlocked: a setting that the config leaves at its default can be given too. flowjax checks every key, and says what is valid.
CONFIG = config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, pictures.")
COORDINATOR = flags.DEFINE_string("coordinator", "", 'Several processes: host:port of process 0, or "auto".')
PROCESSES = flags.DEFINE_integer("processes", 0, "Several processes: how many.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Several processes: which one this is.")
flags.mark_flags_as_required(["config", "workdir"])


def main():
    runtime.setup(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
    from flowjax.train import loop

    try:
        loop.run(CONFIG.value, WORKDIR.value)
    except loop.NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    shell.run(main)
