"""Adversarial distillation of configs/digits.py into four steps: ADD (2311.17042), or LADD (2403.12015).

    python -m experiments.train --config=configs/digits_add.py --workdir=runs/digits_add
    python -m experiments.train --config=configs/digits_add.py:features --workdir=runs/digits_add    # of runs/digits_mae
    python -m experiments.train --config=configs/digits_add.py:latent --workdir=runs/digits_ladd
    python -m experiments.evaluate --checkpoint=runs/digits_add --steps=1

The student begins as runs/digits. ADD's discriminator looks at clean images, their pixels or an encoder's features, and runs/digits
teaches; LADD's looks at noisy ones by heads on every layer of runs/digits, which stays as it is, and nobody teaches. Its heads learn forty
times as fast as the student; one on a single layer, as fast as the student, was fooled for good. The paper's law of the discriminator's
times has the mean 1, for images of 1,024 pixels; small ones need less noise.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network, "features" or "latent" for the other ways; "smoke:latent" for both."""
    ways = words(arg, "smoke", "features", "latent")
    smoke = "smoke" in ways
    base = digits.get_config("smoke" if smoke else "").to_dict()
    adam = {"name": "adamw", "b1": 0.0, "b2": 0.99, "clip": 1.0, "schedule": {"name": "constant", "rate": 2e-4, "warmup": 1 if smoke else 50}}
    at = lambda rate: adam | {"schedule": {**adam["schedule"], "rate": rate}}  # noqa: E731
    if "latent" in ways:
        objective = {"distill": 0.0, "gan_time": {"name": "logit_normal", "mean": 0.0, "std": 1.0}}
        heads = {"layer": tuple(range(1, base["model"]["depth"] + 1)), "features": 1, "hidden": 64}
        judge = {
            "checkpoint": "runs/digits", "model": base["model"] | {"projector": heads},
            "optimizer": at(2e-3) | {"rules": [{"match": "^(?!projector)", "rate": 0.0}]},
        }  # fmt: skip
        roles = {"net": {"checkpoint": "runs/digits"}, "discriminator": judge}
    else:
        objective = {"distill": 2.5, "guidance": {"name": "cfg", "scale": 1.5}}
        judge = {"model": {"name": "patch_gan", "channels": 32, "layers": 1, "groups": 8}, "optimizer": adam}
        roles = {"net": {"checkpoint": "runs/digits"}, "teacher": {"checkpoint": "runs/digits"}, "discriminator": judge}
        if "features" in ways:
            judge["model"] = {"name": "feature_head", "hidden": 64}
            roles["encoder"] = {"checkpoint": "runs/digits_mae"}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 4000,
            "objective": {"name": "adversarial_distillation", "steps": 4, **objective},
            "optimizer": at(5e-5) if "latent" in ways else adam,
            "roles": roles,
            "ema": {"ema": {"name": "warmup", "decay": 0.99}},
            "sample": base["sample"] | {"steps": 4, "sampler": "renoise", "guidance": "none"},
        }
    )
