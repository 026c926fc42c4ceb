"""Progressive distillation from a teacher to ever fewer steps, a run for each halving.

    python -m experiments.progressive --config=configs/digits_pd.py --teacher=runs/digits --steps=16,8,4,2,1 --workdir=runs/digits_pd

The student of N steps is trained in workdir/N from that of 2 N (the first from the teacher, which takes twice its steps). The same
command goes on where it was stopped.
"""

from absl import flags
from ml_collections import config_flags

from experiments import shell
from flowjax.train import runtime

CONFIG = config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)
TEACHER = flags.DEFINE_string("teacher", None, "An export, or the workdir of a run.", required=True)
STEPS = flags.DEFINE_list("steps", None, "Steps of the students, in turn, each half of the one before.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
flags.mark_flag_as_required("config")


def main():
    runtime.setup()
    from flowjax.train import progressive

    progressive.run(CONFIG.value, TEACHER.value, STEPS.value, WORKDIR.value)
    return 0


if __name__ == "__main__":
    shell.run(main)
