"""DreamBooth on the emoji (2208.12242): a few pictures of a subject under a rare word, with prior preservation, as a LoRA.

    python -m tools.prepare_data --door=folder --path=my_cat --out=data/my_cat --size=64 --channels=3    # captions "zwx cat face"
    python -m tools.make_images --checkpoint=runs/emoji_pixel --prompt="cat face" --count=200 --guidance=2 --out=data/cat_faces
    python -m experiments.train --config=configs/emoji_dreambooth.py:data/emoji,data/my_cat,data/cat_faces --workdir=runs/my_cat
    python -m experiments.sample --checkpoint=runs/my_cat --prompt="zwx cat face" --prompt="cat face"

The word is one that the captions do not have and the tokenizer can spell. Half of the rows are the subject's, the others what the
network made of the class before; the loss is the sum of their two means. --config.objective.prior=0.0 leaves the second out.
"""

from configs import digits_lora, emoji_pixel
from flowjax.config import ConfigError
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/emoji,data/my_cat,data/cat_faces"):
    """arg: the data of the base (for its tokenizer), the subject's, those of its class; before them "smoke:" for a few steps."""
    smoke, paths = arg.startswith("smoke:"), arg.removeprefix("smoke:").split(",")
    if len(paths) != 3:
        raise ConfigError(f"configs/emoji_dreambooth.py:{arg} should name three data sets with commas between: the base's, the subject's, the class's")
    base = emoji_pixel.get_config(f"{'smoke:' * smoke}{paths[0]}").to_dict()
    subject, rehearsed = ({**base["data"], "path": path} for path in paths[1:])
    lora = {"pattern": digits_lora.KERNELS, "rank": 2 if smoke else 8, "alpha": 2.0 if smoke else 8.0, "dora": False}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 400,
            "batch_size": 8 if smoke else 16,
            "data": {"name": "mixture", "parts": (subject, rehearsed), "weights": (1.0, 1.0), "prior": (1,)},
            "objective": {**base["objective"], "prior": 1.0},
            "roles": {"net": {"checkpoint": "runs/emoji_pixel", "lora": lora}},
            "optimizer": {"name": "adamw", "schedule": {"name": "constant", "rate": 5e-4, "warmup": 1 if smoke else 20}, "clip": 1.0},
            "ema": {"ema": {"name": "constant", "decay": 0.98}},
            "sample": {**base["sample"], "prompts": ("zwx cat face", "cat face")},
            "validation": {"every": 0},
        }
    )
