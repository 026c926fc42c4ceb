"""Preferences between the network's own samples of the digits: more ink. Online DPO, or stepwise after SPO (2406.04314).

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/digits_online_dpo.py --workdir=runs/digits_online_dpo
    python -m experiments.train --config=configs/digits_online_dpo.py:stepwise --workdir=runs/digits_stepwise
    python -m tools.win_rate --checkpoint=runs/digits_online_dpo --against=runs/digits --reward=ink

Starts from runs/digits, the reference. Online, the best of 8 samples is preferred to the worst; stepwise, the better of 4 candidates of
each step. The two other rewards are measured only, with the rest of the panel (samples are drawn and measured every 50 steps).
"""

from configs import digits
from flowjax.config import ConfigError
from flowjax.train.settings import config_dict


def get_config(arg: str = ""):
    """arg: "" or "stepwise"; "smoke:" before it for a few steps of a tiny network."""
    smoke, kind = arg.startswith("smoke"), arg.removeprefix("smoke").removeprefix(":")
    reward = {"ink": 1.0, "upper": 0.0, "symmetry": 0.0}
    objectives = {
        "": {"name": "online_dpo", "reward": reward, "group": 4 if smoke else 8, "steps": 3 if smoke else 10, "beta": 200.0},
        "stepwise": {"name": "stepwise_preference", "reward": reward, "candidates": 4, "steps": 3 if smoke else 10, "beta": 100.0},
    }
    if kind not in objectives:
        raise ConfigError(f"configs/digits_online_dpo.py:{arg}: {kind!r} is unknown; valid: stepwise")
    return config_dict(
        **digits.get_config("smoke" if smoke else "").to_dict()
        | {
            "steps": 4 if smoke else 300,
            "objective": objectives[kind],
            "optimizer": {"name": "adamw", "clip": 1.0, "schedule": {"name": "constant", "rate": 5e-5, "warmup": 1 if smoke else 20}},
            "roles": {"reference": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits"}},
            "ema": {"ema": {"name": "constant", "decay": 0.9}},
            "validation": {"every": 0},
            "panel": {"every": 0 if smoke else 50, "count": 40 if smoke else 500, "steps": 3 if smoke else 10},
        }
    )
