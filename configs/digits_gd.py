"""Guidance distillation of the digits DiT: one pass a step instead of two, with the scale of guidance as an input.

    python -m experiments.train --config=configs/digits_gd.py --workdir=runs/digits_gd
    python -m experiments.evaluate --checkpoint=runs/digits_gd --guidance=1.5

The teacher, from which the student also starts (all but the embedding of the scale), is runs/digits; another one is given by
--config.roles.teacher.checkpoint=... --config.roles.net.checkpoint=...
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps. The student has the teacher's network and the input."""
    smoke = bool(words(arg, "smoke"))
    base = digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 1000,
            "model": base["model"] | {"guidance_embed": True},
            "objective": {
                "name": "guidance_distillation", "time": {"name": "uniform", "stratified": True}, "scale_min": 1.0, "scale_max": 4.0,
            },
            "ema": {"ema": {"name": "constant", "decay": 0.99}},
            "optimizer": {"name": "adamw", "schedule": {"name": "cosine", "rate": 5e-4, "warmup": 1 if smoke else 50}, "clip": 1.0},
            "roles": {"teacher": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits"}},
            "sample": base["sample"] | {"guidance": {"name": "embedded", "scale": 2.0}},
        }
    )  # fmt: skip
