"""Supervised fine-tuning on the digits: runs/digits goes on with few, chosen examples, at a low rate and not for long.

    python -m tools.curate --data=digits --reward=symmetry --best=0.2 --each_class --out=data/digits_curated
    python -m experiments.train --config=configs/digits_sft.py:data/digits_curated --workdir=runs/digits_sft
    python -m tools.win_rate --checkpoint=runs/digits_sft --against=runs/digits --reward=symmetry

Two rows in ten are replay of all digits, so that little is forgotten; the embeddings of patches and times are frozen. Any other choice of
examples is a data set like any other: --least=0.9 instead of --best, or --rows=chosen.txt for what a person has picked.
"""

from configs import digits
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/digits_curated"):
    """arg: the curated data; before it "smoke:" for a few steps. The network is that of configs/digits.py."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    base = digits.get_config("smoke" if smoke else "").to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 300,
            "data": {"name": "mixture", "parts": ({"name": "array_record", "path": path}, {"name": "digits"}), "weights": (0.8, 0.2)},
            "roles": {"net": {"checkpoint": "runs/digits"}},
            "optimizer": {
                "name": "adamw", "schedule": {"name": "constant", "rate": 1e-4, "warmup": 1 if smoke else 20}, "clip": 1.0,
                "rules": ({"match": "^[xt]_embed/", "rate": 0.0},),
            },
            "ema": {"ema": {"name": "constant", "decay": 0.98}},
        }
    )  # fmt: skip
