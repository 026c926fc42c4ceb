"""Preferences on the digits: more ink. Diffusion-DPO, its IPO, or KTO.

    python -m tools.prefer --checkpoint=runs/digits --reward=ink --out=runs/pairs
    python -m experiments.train --config=configs/digits_dpo.py --workdir=runs/digits_dpo
    python -m experiments.train --config=configs/digits_dpo.py:ipo --workdir=runs/digits_ipo        # or :kto
    python -m tools.win_rate --checkpoint=runs/digits_dpo --against=runs/digits --reward=ink

The reference, from which the trained network also starts, is runs/digits.
"""

from configs import digits
from flowjax.config import ConfigError
from flowjax.train.settings import config_dict


def get_config(arg: str = ""):
    """arg: "" (Diffusion-DPO), "ipo" or "kto"; "smoke:" before it for a few steps. The network is the reference's."""
    smoke, kind = arg.startswith("smoke"), arg.removeprefix("smoke").removeprefix(":")
    base = digits.get_config("smoke" if smoke else "").to_dict()
    other = {"": {"name": "diffusion_dpo"}, "ipo": {"name": "diffusion_dpo", "link": "squared"}, "kto": {"name": "diffusion_kto"}}
    if kind not in other:
        raise ConfigError(f"configs/digits_dpo.py:{arg}: {kind!r} is unknown; valid: {', '.join(k for k in other if k)}")
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 300,
            "data": {"name": "preferences", "path": "runs/pairs"},
            "objective": {**other[kind], "beta": 200.0, "form": "velocity", "time": {"name": "uniform", "stratified": True}},
            "ema": {"ema": {"name": "constant", "decay": 0.98}},
            "optimizer": {"name": "adamw", "schedule": {"name": "constant", "rate": 5e-5, "warmup": 1 if smoke else 50}, "clip": 1.0},
            "roles": {"reference": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits"}},
            "validation": {"every": 0},
            "evaluate": {**base["evaluate"], "data": "digits"},
            "panel": {
                "every": 2 if smoke else 50, "count": 40 if smoke else 500, "steps": 3 if smoke else 10, "rewards": ("ink", "upper", "symmetry"),
            },
        }
    )
