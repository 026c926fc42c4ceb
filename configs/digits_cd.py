"""Consistency distillation of the digits DiT: one or two steps instead of fifty, guidance included.

    python -m experiments.train --config=configs/digits_cd.py --workdir=runs/digits_cd
    python -m experiments.evaluate --checkpoint=runs/digits_cd --steps=1

The teacher, from which the student also starts, is runs/digits; another one is given by
--config.roles.teacher.checkpoint=... --config.roles.net.checkpoint=...
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps. The student has the teacher's network."""
    smoke = bool(words(arg, "smoke"))
    base = digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 500,
            "objective": {
                "name": "consistency_distillation", "steps": 18, "solver": "heun", "metric": "pseudo_huber", "huber": 0.03,
                "guidance": {"name": "cfg", "scale": 2.0},
            },
            "ema": {"ema": {"name": "warmup", "decay": 0.99}, "target": {"name": "constant", "decay": 0.95}},
            "optimizer": {"name": "adamw", "schedule": {"name": "cosine", "rate": 5e-4, "warmup": 1 if smoke else 50}, "clip": 1.0},
            "roles": {"teacher": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits"}},
            "sample": base["sample"] | {"steps": 2, "sampler": "renoise", "guidance": "none"},
        }
    )
