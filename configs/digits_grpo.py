"""Flow-GRPO (2505.05470) on the digits: more ink.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/digits_grpo.py --workdir=runs/digits_grpo
    python -m tools.win_rate --checkpoint=runs/digits_grpo --against=runs/digits --reward=ink

The reference, from which the trained network also starts, is runs/digits. Two updates on 128 samples a step; the two other rewards
are measured only, so that it shows when the first is exploited. MixGRPO: --config.objective.window=4 --config.objective.move=25.
What it reaches with beta = 0.3: experiments/studies/results/rewards.md; with beta = 0.004, the authors' on their images, a single short run
ended in white squares.
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
                "name": "flow_grpo", "reward": {"ink": 1.0, "upper": 0.0, "symmetry": 0.0}, "group": 4 if smoke else 16,
                "steps": 3 if smoke else 10, "clip": 0.1, "beta": 0.3,
            },
            "optimizer": {"name": "adamw", "clip": 1.0, "schedule": {"name": "constant", "rate": 1e-4, "warmup": 1 if smoke else 20}},
            "roles": {"reference": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits", "updates": 2}},
            "ema": {"ema": {"name": "constant", "decay": 0.9}},
            "validation": {"every": 0},
            "panel": {"every": 2 if smoke else 50, "count": 40 if smoke else 500, "steps": 3 if smoke else 10},
        }
    )  # fmt: skip
