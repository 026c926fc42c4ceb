"""Continued training on the digits: a network that knows 0 to 4 learns 5 to 9, and rehearses what it knows.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits_low --config.data="{'name': 'digits', 'classes': (0, 1, 2, 3, 4)}"
    python -m experiments.train --config=configs/digits_continue.py --workdir=runs/digits_continue
    python -m experiments.evaluate --checkpoint=runs/digits_continue --data=digits

Starts from the averaged weights of runs/digits_low, with a new optimizer state. Three rows in ten are replay; without it,
--config.data="{'name': 'digits', 'classes': (5, 6, 7, 8, 9)}", the old classes are forgotten. Of two neighbouring layers the one nearer
the input learns at 0.8 of the other's rate. The average is restarted; one that goes on, beside the raw weights:

    --config.roles.net.weights=params --config.roles.net.average=ema

card.txt says which checkpoint and weights these are, what learns at which rate, which share is replay and where the average began.
"""

from configs import digits
from flowjax.train.settings import config_dict, words

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps. The network is that of configs/digits.py."""
    smoke = bool(words(arg, "smoke"))
    base = digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 1000,
            "data": {"name": "mixture", "parts": ({"name": "digits", "classes": NEW}, {"name": "digits", "classes": OLD}), "weights": (0.7, 0.3)},
            "roles": {"net": {"checkpoint": "runs/digits_low"}},
            "optimizer": {
                "name": "adamw", "schedule": {"name": "cosine", "rate": 5e-4, "warmup": 1 if smoke else 50}, "clip": 1.0,
                "rules": ({"match": r"^block_\d+/", "layer_decay": 0.8},),
            },
        }
    )  # fmt: skip
