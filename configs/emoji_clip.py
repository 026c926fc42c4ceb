"""Two towers that learn which caption belongs to which emoji: the judge of text-to-image models, trained on seeds of its own.

    python -m experiments.train --config=configs/emoji_clip.py:data/emoji --workdir=runs/emoji_clip

Data and tokenizer as for configs/emoji_pixel.py.
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/emoji"):
    """arg: directory of the prepared data, "smoke:" before it for a few steps of a tiny network."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    width = 32 if smoke else 128
    return config_dict(
        seed=1000,
        steps=4 if smoke else 600,
        batch_size=8 if smoke else 128,
        data={
            "name": "array_record", "path": path,
            "text": {"name": "file", "path": f"{path}/tokenizer.json", "length": 24},
        },
        model={
            "name": "two_tower", "features": 64,
            "image": {"patch": 8, "grid": 8, "width": width, "depth": 1 if smoke else 4, "heads": 4},
            "text": {"vocab": 2000, "length": 24, "width": width, "depth": 1 if smoke else 2, "heads": 4},
        },
        objective={"name": "contrastive"},
        optimizer={"name": "adamw", "decay": 0.1, "schedule": {"name": "cosine", "rate": 1e-3, "warmup": 2 if smoke else 100}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.99}},
        checkpoint={"every": 2 if smoke else 200},
        validation={"every": 4 if smoke else 200, "batches": 1},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
