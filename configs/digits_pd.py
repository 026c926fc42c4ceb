"""Progressive distillation (2202.00512) of configs/digits.py, guidance baked in at the first halving.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.progressive --config=configs/digits_pd.py --teacher=runs/digits --steps=16,8,4,2,1 --workdir=runs/digits_pd
    python -m experiments.evaluate --checkpoint=runs/digits_pd/1

The student of N steps is sampled with N Euler (DDIM) steps on a uniform grid, and not guided again.
"""

from configs import digits
from flowjax.train.settings import config_dict


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke, base = arg == "smoke", digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 1000,
            "objective": {"name": "progressive_distillation", "steps": 16, "guidance": {"name": "cfg", "scale": 1.5}},
            "roles": {name: {"checkpoint": "runs/digits"} for name in ("teacher", "net")},
            "optimizer": base["optimizer"] | {"schedule": {"name": "cosine", "rate": 5e-4, "warmup": 1 if smoke else 20}},
            "ema": {"ema": {"name": "warmup", "decay": 0.99}},
            "sample": base["sample"] | {"steps": 16, "sampler": "ddim", "guidance": "none"},
        }
    )
