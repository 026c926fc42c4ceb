"""A reward model of the digits, from preferences by rule, by hand or by another reward: Bradley-Terry on a classifier's features.

    python -m experiments.train --config=configs/digits_classifier.py:clean --workdir=runs/digits_clean
    python -m tools.prefer --checkpoint=runs/digits --reward=ink --pairs=2000 --holdout=0.2 --out=runs/pairs
    python -m experiments.train --config=configs/digits_reward.py --workdir=runs/digits_reward
    python -m experiments.evaluate --checkpoint=runs/digits_reward          # held-out pairs: accuracy, calibration
    python -m experiments.train --config=configs/digits_refl.py --workdir=runs/digits_refl \\
        --config.objective.reward="{'model': 1.0, 'ink': 0.0}" \\
        --config.roles="{'net': {'checkpoint': 'runs/digits'}, 'reward': {'checkpoint': 'runs/digits_reward'}}"

Rankings (tools.prefer --rankings) are learned from by Plackett-Luce, with the same settings. --config.data.noise=0.2 turns a fifth of the
train split's labels round.
"""

from configs import digits_classifier
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke = bool(words(arg, "smoke"))
    backbone = digits_classifier.get_config("smoke" if smoke else "clean").to_dict()["model"] | {"time": False}
    return config_dict(
        steps=4 if smoke else 400,
        batch_size=16 if smoke else 128,
        data={"name": "preferences", "path": "runs/pairs"},
        model={"name": "reward", "backbone": backbone, "num_classes": 10},
        objective={"name": "reward_model"},
        roles={"net": {"checkpoint": "runs/digits_clean"}},
        optimizer={
            "name": "adamw", "decay": 0.1, "clip": 1.0, "schedule": {"name": "cosine", "rate": 1e-3, "warmup": 1 if smoke else 20},
        },
        ema={"ema": {"name": "warmup", "decay": 0.99}},
        checkpoint={"every": 2 if smoke else 200},
        validation={"every": 4 if smoke else 100, "batches": 1 if smoke else 3},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
