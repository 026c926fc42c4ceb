"""Distribution matching with a discriminator (DMD2, 2405.14867) of configs/digits.py into one step, or more.

    python -m experiments.train --config=configs/digits_dmd2.py --workdir=runs/digits_dmd2
    python -m experiments.evaluate --checkpoint=runs/digits_dmd2

With "lora" after the config's name, as in configs/digits_dmd2.py:lora, the generator is an adapter of the teacher. As
configs/digits_dmd.py, with a third player that begins as the teacher, runs/digits, as well, and judges by a head on its second layer.
"""

from configs import digits, digits_dmd
from configs.digits_lora import KERNELS
from flowjax.train.settings import words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network, "lora" for an adapter; "smoke:lora" for both."""
    ways = words(arg, "smoke", "lora")
    size = "smoke" if "smoke" in ways else ""
    config, base = digits_dmd.get_config(size), digits.get_config(size).to_dict()
    with config.unlocked():
        if "lora" in ways:
            config.roles.net.lora = {"pattern": KERNELS, "rank": 2 if size else 16, "alpha": 2.0 if size else 16.0}
        config.objective.name = "distribution_matching_gan"
        config.objective.adversarial_weight = 3e-3
        config.roles.discriminator = {
            "checkpoint": "runs/digits", "model": base["model"] | {"projector": {"layer": 1 if size else 2, "features": 1, "hidden": 64}},
            "optimizer": config.roles.fake.optimizer.to_dict(),
        }  # fmt: skip
    return config
