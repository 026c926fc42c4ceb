"""A small language model that completes prompts: from "officer" to "woman police officer with dark skin tone".

    python -m tools.make_caption_pairs --path=data/emoji --out=data/emoji_pairs          (data as for configs/emoji_pixel.py)
    python -m experiments.train  --config=configs/emoji_enhance.py:data/emoji,data/emoji_pairs --workdir=runs/emoji_enhance
    python -m experiments.sample --checkpoint=runs/emoji_pixel --prompt="officer" --enhance=runs/emoji_enhance
    python -m experiments.sample --checkpoint=runs/emoji_pixel --prompt="officer" \\
        --enhance="{'name': 'model', 'checkpoint': 'runs/emoji_enhance', 'temperature': 0.0}"

The loss is that of the caption alone, given the prompt. How much it helps: python -m experiments.study enhance (not measured yet).
"""

from flowjax.config import ConfigError
from flowjax.train.settings import config_dict

LENGTH = 48  # tokens of a prompt and its caption together


def get_config(arg: str = "data/emoji,data/emoji_pairs"):
    """arg: the data of the images (for its tokenizer) and the pairs; "smoke:" before them for a few steps of a tiny network."""
    smoke, paths = arg.startswith("smoke:"), arg.removeprefix("smoke:").split(",")
    if len(paths) != 2:
        raise ConfigError(f"configs/emoji_enhance.py:{arg} should name two data sets with a comma between: the images and the pairs")
    return config_dict(
        steps=4 if smoke else 2000,
        batch_size=8 if smoke else 64,
        data={
            "name": "array_record", "path": paths[1],
            "text": {"name": "file", "path": f"{paths[0]}/tokenizer.json", "length": LENGTH, "pairs": True},
        },
        model={
            "name": "language_model", "vocab": 2000, "length": LENGTH, "width": 32 if smoke else 128, "depth": 1 if smoke else 4, "heads": 4,
        },
        objective={"name": "language_model", "prefix": 1},
        optimizer={"name": "adamw", "decay": 0.1, "schedule": {"name": "cosine", "rate": 1e-3, "warmup": 2 if smoke else 100}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.99}},
        checkpoint={"every": 2 if smoke else 500},
        validation={"every": 4 if smoke else 250, "batches": 1 if smoke else 2},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
