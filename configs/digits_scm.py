"""Continuous-time consistency (sCM, 2410.11081) on the digits, distilled from configs/digits.py or trained without a teacher.

    python -m experiments.train --config=configs/digits_scm.py --workdir=runs/digits_scm
    python -m experiments.train --config=configs/digits_scm.py:training --workdir=runs/digits_sct
    python -m experiments.evaluate --checkpoint=runs/digits_scm --steps=1

The student does not begin as the teacher: its time is not multiplied by 1,000, because the loss has the network's derivative by it.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network, "training" for no teacher, "smoke:training" for both."""
    ways = words(arg, "smoke", "training")
    smoke, alone = "smoke" in ways, "training" in ways
    base = digits.get_config("smoke" if smoke else "").to_dict()
    objective = {
        "name": "scm_training" if alone else "scm_distillation",
        "time": {"name": "edm_lognormal", "p_mean": -0.8, "p_std": 1.6, "stratified": True},
        "warmup": 2 if smoke else 1000,
    }
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 4000,
            "model": base["model"] | {"time_scale": 1.0},
            "objective": objective if alone else objective | {"guidance": {"name": "cfg", "scale": 2.0}},
            "roles": {} if alone else {"teacher": {"checkpoint": "runs/digits"}},
            "optimizer": {"name": "radam", "schedule": {"name": "constant", "rate": 1e-3, "warmup": 2 if smoke else 100}, "clip": 1.0},
            "sample": base["sample"] | {"steps": 2, "sampler": "renoise", "guidance": "none"},
        }
    )  # fmt: skip
