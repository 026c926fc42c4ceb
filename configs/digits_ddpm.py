"""Diffusion as in DDPM: U-Net, variance-preserving path, noise prediction, ancestral sampling.

    python -m experiments.train --config=configs/digits_ddpm.py --workdir=runs/digits_ddpm
    python -m experiments.sample --checkpoint=runs/digits_ddpm --sampler=ddim --steps=25
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke = bool(words(arg, "smoke"))
    base = digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "model": {
                "name": "unet", "channels": 8 if smoke else 32, "multipliers": (1,) if smoke else (1, 2), "layers": 1, "attention_levels": (0,) if smoke else (1,),
                "groups": 4, "num_classes": 10, "scale_shift": True, "dropout": 0.1,
            },
            "path": {"name": "vp_linear"},
            "prediction": "eps",
            "objective": {"name": "flow_matching", "time": {"name": "uniform", "stratified": True}, "weight": "none", "label_drop": 0.1},
            "sample": base["sample"] | {"sampler": "ancestral", "steps": 4 if smoke else 100},
        }
    )
