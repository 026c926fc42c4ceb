"""Moment matching distillation (2406.04103) of configs/digits.py into four steps.

    python -m experiments.train --config=configs/digits_moment.py --workdir=runs/digits_moment
    python -m experiments.evaluate --checkpoint=runs/digits_moment

With "parameters" after the config's name, as in configs/digits_moment.py:parameters, there is no auxiliary: the paper's other form. For another number of steps: --config.objective.steps=2 --config.sample.steps=2. The student and the auxiliary both begin as the teacher,
runs/digits.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network, "parameters" for the form without an auxiliary; "smoke:parameters" for both."""
    ways = words(arg, "smoke", "parameters")
    smoke, base = "smoke" in ways, digits.get_config("smoke" if "smoke" in ways else "").to_dict()
    name, roles = ("parameter_moment_matching", ("teacher", "net")) if "parameters" in ways else ("moment_matching", ("teacher", "net", "auxiliary"))
    adam = {"name": "adamw", "b1": 0.0, "b2": 0.99, "clip": 1.0, "schedule": {"name": "cosine", "rate": 2e-4, "warmup": 1 if smoke else 50}}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 4000,
            "objective": {
                "name": name, "steps": 4, "time": {"name": "uniform", "t_min": 0.02}, "guidance": {"name": "cfg", "scale": 1.5},
            },
            "optimizer": adam,
            "roles": {k: {"checkpoint": "runs/digits"} for k in roles},
            "ema": {"ema": {"name": "warmup", "decay": 0.99}},
            "sample": base["sample"] | {"steps": 4, "sampler": "ancestral", "guidance": "none"},
        }
    )  # fmt: skip
