"""A reward model of emoji and their captions on the two towers of configs/emoji_clip.py, with whose cosine it begins.

    python -m experiments.train --config=configs/emoji_clip.py:data/emoji --workdir=runs/emoji_clip
    python -m tools.prefer --checkpoint=runs/emoji_pixel --prompts=prompts.txt --reward=red --pairs=1000 --holdout=0.2 --out=data/emoji_pairs
    python -m experiments.train --config=configs/emoji_reward.py:data/emoji_pairs,data/emoji --workdir=runs/emoji_reward

The towers' attention blocks are frozen (ImageReward freezes most of its layers too).
"""

from configs import emoji_clip
from flowjax.config import ConfigError
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/emoji_pairs,data/emoji"):
    """arg: directories of the preferences and of the data whose tokenizer.json the towers read, "smoke:" before them for a few steps."""
    smoke, paths = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    if paths.count(",") != 1:
        raise ConfigError(f"configs/emoji_reward.py:{arg} should name two data sets with a comma between: the pairs and the images")
    pairs, data = paths.split(",")
    towers = emoji_clip.get_config(f"smoke:{data}" if smoke else data).to_dict()
    return config_dict(
        seed=2000,
        steps=4 if smoke else 400,
        batch_size=8 if smoke else 64,
        data={"name": "preferences", "path": pairs, "text": towers["data"]["text"]},
        model={"name": "reward", "backbone": towers["model"], "hidden": 8 if smoke else 64},
        objective={"name": "reward_model"},
        roles={"net": {"checkpoint": "runs/emoji_clip"}},
        optimizer={
            "name": "adamw", "decay": 0.1, "clip": 1.0, "schedule": {"name": "cosine", "rate": 3e-4, "warmup": 2 if smoke else 20},
            "rules": ({"match": "body/.*/blocks/", "rate": 0.0},),
        },
        ema={"ema": {"name": "warmup", "decay": 0.99}},
        checkpoint={"every": 2 if smoke else 200},
        validation={"every": 0 if smoke else 100, "batches": 2},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
