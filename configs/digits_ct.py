"""Consistency training (no teacher) on the digits, with the choices of iCT: doubling grid, pseudo-Huber, target without memory.

    python -m experiments.train --config=configs/digits_ct.py --workdir=runs/digits_ct
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke = bool(words(arg, "smoke"))
    base = digits.get_config(arg).to_dict()
    steps = 4 if smoke else 4000
    return config_dict(
        **base
        | {
            "steps": steps,
            "objective": {
                "name": "consistency_training", "steps": 10, "schedule": "doubling", "steps_max": 160, "total_steps": steps,
                "time": {"name": "edm_lognormal", "p_mean": -1.1, "p_std": 2.0}, "metric": "pseudo_huber", "huber": 0.03,
                "weighting": "inverse_gap",
            },
            "ema": {"ema": {"name": "warmup", "decay": 0.999}, "target": {"name": "constant", "decay": 0.0}},
            "optimizer": {"name": "radam", "schedule": {"name": "constant", "rate": 5e-4}, "clip": 1.0},
            "sample": base["sample"] | {"steps": 2, "sampler": "renoise", "guidance": "none"},
        }
    )
