"""The digits DiT by latent consistency distillation (LCM, 2310.04378): few steps, with the scale of guidance as an input.

    python -m experiments.train --config=configs/digits_lcm.py --workdir=runs/digits_lcm
    python -m experiments.evaluate --checkpoint=runs/digits_lcm --guidance=2 --steps=1
    python -m experiments.train --config=configs/digits_lcm.py:lora --workdir=runs/digits_lcm_lora

With "lora" (LCM-LoRA, 2311.05556) the student is an adapter of the teacher, with the embedding of the scale in it. The teacher, from which the student also starts (all but the embedding of the scale), is runs/digits.
"""

from configs import digits
from configs.digits_lora import KERNELS
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network, "lora" for an adapter; "smoke:lora" for both."""
    ways = words(arg, "smoke", "lora")
    smoke, base = "smoke" in ways, digits.get_config("smoke" if "smoke" in ways else "").to_dict()
    adapter = {"lora": {"pattern": KERNELS, "rank": 2 if smoke else 16, "alpha": 2.0 if smoke else 16.0}} if "lora" in ways else {}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 1000,
            "model": base["model"] | {"guidance_embed": True},
            "objective": {
                "name": "latent_consistency", "steps": 50, "skip": 2, "scale_min": 1.0, "scale_max": 4.0,
                "metric": "pseudo_huber", "huber": 0.03,
            },
            "ema": {"ema": {"name": "warmup", "decay": 0.99}, "target": {"name": "constant", "decay": 0.95}},
            "optimizer": {"name": "adamw", "schedule": {"name": "cosine", "rate": 5e-4, "warmup": 1 if smoke else 50}, "clip": 1.0},
            "roles": {"teacher": {"checkpoint": "runs/digits"}, "net": {"checkpoint": "runs/digits", **adapter}},
            "sample": base["sample"] | {"steps": 2, "sampler": "renoise", "guidance": {"name": "embedded", "scale": 2.0}},
        }
    )  # fmt: skip
