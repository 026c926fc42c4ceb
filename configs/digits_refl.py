"""ReFL (2304.05977) on the digits: more ink, by the reward's gradient through the last step.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/digits_refl.py --workdir=runs/digits_refl
    python -m tools.win_rate --checkpoint=runs/digits_refl --against=runs/digits --reward=ink

Starts from runs/digits, and flow matching on the data holds it back. DRaFT-K:
--config.objective.through=3 --config.objective.late=1. What it reaches, with a greater strength: experiments/studies/results/rewards.md.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke, base = bool(words(arg, "smoke")), digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 300,
            "objective": {
                "name": "reward_feedback", "reward": {"ink": 1.0, "upper": 0.0, "symmetry": 0.0}, "steps": 4 if smoke else 20,
                "through": 1, "late": 2 if smoke else 8, "strength": 2.0, "pretrain": 1.0,
            },
            "optimizer": {"name": "adamw", "clip": 1.0, "schedule": {"name": "constant", "rate": 5e-5, "warmup": 1 if smoke else 20}},
            "roles": {"net": {"checkpoint": "runs/digits"}},
            "ema": {"ema": {"name": "constant", "decay": 0.9}},
            "validation": {"every": 0},
            "panel": {"every": 0 if smoke else 50, "count": 40 if smoke else 500, "steps": 3 if smoke else 10},
        }
    )  # fmt: skip
