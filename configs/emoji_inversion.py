"""Textual inversion on the emoji (2208.01618): a few pictures of a subject teach the network a new word, of which only the embedding is trained.

    python -m tools.prepare_data --door=folder --path=my_cat --out=data/my_cat --size=64 --channels=3    # captions "<mine>", "a <mine>"
    python -m experiments.train  --config=configs/emoji_inversion.py:data/emoji,data/my_cat --workdir=runs/my_word
    python -m experiments.sample --checkpoint=runs/emoji_pixel --lora=runs/my_word --prompt="<mine>" --prompt="<mine> with dark skin tone"
    python -m experiments.export --workdir=runs/my_word --adapter=flowjax --out=my_word               # some numbers, for --lora=my_word

The word begins as what --config.roles.net.lora.init says, a coarse one of the captions. Several embeddings for one word:
--config.roles.net.lora.vectors=2 with the same number in --config.data.text.added="{'<mine>': 2}".
"""

from configs import emoji_pixel
from flowjax.config import ConfigError
from flowjax.train.settings import config_dict

WORD = "<mine>"


def get_config(arg: str = "data/emoji,data/my_cat"):
    """arg: the data of the base (for its tokenizer) and the subject's; "smoke:" before them for a few steps."""
    smoke, paths = arg.startswith("smoke:"), arg.removeprefix("smoke:").split(",")
    if len(paths) != 2:
        raise ConfigError(f"configs/emoji_inversion.py:{arg} should name two data sets with a comma between: the base's and the subject's")
    base = emoji_pixel.get_config(f"{'smoke:' * smoke}{paths[0]}").to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 500,
            "batch_size": 8 if smoke else 16,
            "data": base["data"] | {"path": paths[1], "text": base["data"]["text"] | {"added": {WORD: 1}}},
            "objective": {**base["objective"], "label_drop": 0.0},
            "roles": {"net": {"checkpoint": "runs/emoji_pixel", "lora": {"token": WORD, "init": "face", "vectors": 1}}},
            "optimizer": {"name": "adamw", "schedule": {"name": "constant", "rate": 5e-3, "warmup": 1 if smoke else 20}},
            "ema": {"ema": {"name": "constant", "decay": 0.98}},
            "sample": {**base["sample"], "prompts": (WORD, "face")},
            "validation": {"every": 0},
        }
    )
