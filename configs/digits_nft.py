"""DiffusionNFT (2509.16117) on the digits: more ink, learned from samples as from data.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/digits_nft.py --workdir=runs/digits_nft
    python -m tools.win_rate --checkpoint=runs/digits_nft --against=runs/digits --reward=ink

Starts from runs/digits, to which the anchor holds it; without an anchor single short runs went on to ever brighter images. What it
reaches, with a weaker anchor: experiments/studies/results/rewards.md.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke, base = bool(words(arg, "smoke")), digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 300,
            "objective": {
                "name": "diffusion_nft", "reward": {"ink": 1.0, "upper": 0.0, "symmetry": 0.0}, "group": 4 if smoke else 16,
                "steps": 3 if smoke else 10, "draws": 2 if smoke else 4, "beta": 1.0, "anchor": 0.1,
            },
            "optimizer": {"name": "adamw", "clip": 1.0, "schedule": {"name": "constant", "rate": 1e-4, "warmup": 1 if smoke else 20}},
            "roles": {"reference": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits"}},
            "ema": {"ema": {"name": "constant", "decay": 0.9}, "old": {"name": "ramp", "decay": 0.5, "slope": 0.001}},
            "validation": {"every": 0},
            "panel": {"every": 0 if smoke else 50, "count": 40 if smoke else 500, "steps": 3 if smoke else 10},
        }
    )  # fmt: skip
