"""Diffusion-DPO on the digits: prefer more ink.

    python -m tools.prefer --checkpoint=runs/digits --reward=ink --out=runs/pairs
    python -m experiments.train --config=configs/digits_dpo.py --workdir=runs/digits_dpo
    python -m tools.win_rate --checkpoint=runs/digits_dpo --against=runs/digits --reward=ink

The reference, from which the trained network also starts, is runs/digits.
"""

from configs import digits
from flowjax.train.settings import config_dict


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps. The network is the reference's."""
    smoke = arg == "smoke"
    base = digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 300,
            "data": {"name": "preferences", "path": "runs/pairs"},
            "objective": {"name": "diffusion_dpo", "beta": 200.0, "form": "velocity", "time": {"name": "uniform", "stratified": True}},
            "ema": {"ema": {"name": "constant", "decay": 0.98}},
            "optimizer": {"name": "adamw", "schedule": {"name": "constant", "rate": 5e-5, "warmup": 1 if smoke else 50}, "clip": 1.0},
            "roles": {"reference": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits"}},
            "validation": {"every": 0},
        }
    )
