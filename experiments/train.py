"""Train: python -m experiments.train --config=configs/digits.py --workdir=runs/digits [--config.model.depth=6 ...]

The same command resumes. Ctrl-C or SIGTERM (to any one of several processes) saves and leaves. Exit codes: 0 done, ended by
panel.stop, or saved and left (--stopped chooses another for this), 2 bad settings, 3 a loss that is not finite, 4 another process of
the job is gone.

Several processes: start this command once on each machine with --coordinator=auto, or with --coordinator=host:port
--processes=N --process_id=i, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment.
"""

import sys
import threading

from absl import flags
from ml_collections import config_flags

from experiments import BEGAN, job, shell
from flowjax.train import runtime

# Unlocked: a setting that the config leaves at its default can be given too. flowjax checks every key, and says what is valid.
CONFIG = config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder (or bucket, gs://...) of the run: checkpoints, metrics, pictures.")
STOPPED = flags.DEFINE_integer("stopped", 0, "Exit code of a run that saved and left before its end; launchers tell it by that.")
flags.mark_flags_as_required(["config", "workdir"])


def main():
    job.join()
    from flowjax.train import loop

    try:
        stop = threading.Event()
        loop.run(CONFIG.value, WORKDIR.value, stop, began=BEGAN)
    except loop.NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Exception as error:
        runtime.leave(error)
        raise
    return STOPPED.value if stop.is_set() else 0


if __name__ == "__main__":
    shell.run(main)
