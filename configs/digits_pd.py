"""Progressive distillation (2202.00512) of configs/digits.py, guidance baked in at the first halving.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.progressive --config=configs/digits_pd.py --teacher=runs/digits --steps=16,8,4,2,1 --workdir=runs/digits_pd
    python -m experiments.evaluate --checkpoint=runs/digits_pd/1

With the scale of guidance as an input (2210.03142), after configs/digits_gd.py:

    python -m experiments.progressive --config=configs/digits_pd.py:guided --teacher=runs/digits_gd --steps=16,8,4,2,1 --workdir=runs/digits_pd_guided
    python -m experiments.sample --checkpoint=runs/digits_pd_guided/4 --guidance=2

The student of N steps is sampled with N Euler (DDIM) steps on a uniform grid, and not guided again.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "guided" for networks that take the scale as an input; "smoke" or "smoke:guided" for a few steps of a tiny network."""
    ways = words(arg, "smoke", "guided")
    smoke, guided = "smoke" in ways, "guided" in ways
    base = digits.get_config("smoke" if smoke else "").to_dict()
    objective, sampled = {"name": "progressive_distillation", "guidance": {"name": "cfg", "scale": 1.5}}, "none"
    if guided:
        objective = {"name": "guided_progressive_distillation", "scale_min": 1.0, "scale_max": 4.0}
        base["model"]["guidance_embed"], sampled = True, {"name": "embedded", "scale": 2.0}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 1000,
            "objective": objective | {"steps": 16},
            "roles": {name: {"checkpoint": "runs/digits"} for name in ("teacher", "net")},
            "optimizer": base["optimizer"] | {"schedule": {"name": "cosine", "rate": 5e-4, "warmup": 1 if smoke else 20}},
            "ema": {"ema": {"name": "warmup", "decay": 0.99}},
            "sample": base["sample"] | {"steps": 16, "sampler": "ddim", "guidance": sampled},
        }
    )
