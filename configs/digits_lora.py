"""LoRA on the digits: runs/digits goes on with a few classes, and of its weights only low-rank changes are trained and kept.

    python -m experiments.train  --config=configs/digits_lora.py --workdir=runs/digits_lora
    python -m experiments.sample --checkpoint=runs/digits_lora                          # its base with the adapter
    python -m experiments.sample --checkpoint=runs/digits --lora=runs/digits_lora:0.5   # half of it; several --lora add up
    python -m experiments.export --workdir=runs/digits_lora --adapter=kohya --out=runs/digits_lora/kohya

The base is found again where it was, and refused where it has changed since. --config.roles.net.lora.dora=True trains
magnitudes too.
"""

from configs import digits
from flowjax.train.settings import config_dict, words

KERNELS = r"^block_\d+/(attn|mlp)/\w+/kernel$"


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps. The network is that of configs/digits.py."""
    smoke = bool(words(arg, "smoke"))
    base = digits.get_config(arg).to_dict()
    lora = {"pattern": KERNELS, "rank": 2 if smoke else 8, "alpha": 2.0 if smoke else 8.0, "dora": False}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 500,
            "data": {"name": "digits", "classes": (0, 6, 8, 9)},
            "roles": {"net": {"checkpoint": "runs/digits", "lora": lora}},
            "optimizer": {"name": "adamw", "schedule": {"name": "constant", "rate": 1e-3, "warmup": 1 if smoke else 50}, "clip": 1.0},
            "ema": {"ema": {"name": "constant", "decay": 0.98}},
        }
    )
