"""Distribution matching distillation (2311.18828, 2405.14867) of configs/digits.py into one step, or more.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/digits_dmd.py --workdir=runs/digits_dmd
    python -m experiments.evaluate --checkpoint=runs/digits_dmd

A student of four steps: --config.objective.steps=4 --config.sample.steps=4. The generator and the fake network both begin as the
teacher, runs/digits; the fake takes five steps for each of the generator's.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke, base = bool(words(arg, "smoke")), digits.get_config(arg).to_dict()
    adam = {"name": "adamw", "b1": 0.0, "b2": 0.99, "decay": 0.0, "clip": 1.0, "schedule": {"name": "constant", "rate": 2e-4, "warmup": 1 if smoke else 50}}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 5000,
            "objective": {
                "name": "distribution_matching", "steps": 1, "guidance": {"name": "cfg", "scale": 1.5},
                "time": {"name": "uniform", "t_min": 0.02, "t_max": 0.98},
            },
            "optimizer": adam,
            "roles": {
                "teacher": {"checkpoint": "runs/digits"},
                "net": {"checkpoint": "runs/digits", "every": 2 if smoke else 5},
                "fake": {"checkpoint": "runs/digits", "optimizer": adam},
            },
            "ema": {"ema": {"name": "warmup", "decay": 0.99}},
            "sample": base["sample"] | {"steps": 1, "sampler": "renoise", "guidance": "none"},
        }
    )  # fmt: skip
