"""Distribution matching with a discriminator (DMD2, 2405.14867) of configs/digits.py into one step, or more.

    python -m experiments.train --config=configs/digits_dmd2.py --workdir=runs/digits_dmd2
    python -m experiments.evaluate --checkpoint=runs/digits_dmd2

As configs/digits_dmd.py, with a third player that begins as the teacher, runs/digits, as well, and judges by a head on its second layer.
"""

from configs import digits, digits_dmd


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    config, base = digits_dmd.get_config(arg), digits.get_config(arg).to_dict()
    with config.unlocked():
        config.objective.name = "distribution_matching_gan"
        config.objective.adversarial_weight = 3e-3
        config.roles.discriminator = {
            "checkpoint": "runs/digits", "model": base["model"] | {"projector": {"layer": 2, "features": 1, "hidden": 64}},
            "optimizer": config.roles.fake.optimizer.to_dict(),
        }  # fmt: skip
    return config
