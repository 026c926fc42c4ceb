"""A shortcut model (2410.12557) on digits: one network, trained from nothing, for 1, 2, 4, ... or many steps.

    python -m experiments.train --config=configs/digits_shortcut.py --workdir=runs/digits_shortcut
    python -m experiments.evaluate --checkpoint=runs/digits_shortcut --steps=1

Guidance is in the goals of the finest step, so the samples are not guided again.
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke, base = bool(words(arg, "smoke")), digits.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 4000,
            "model": base["model"] | {"step_embed": True},
            "objective": {
                "name": "shortcut", "time": {"name": "uniform", "stratified": True}, "bootstrap": 0.25, "finest": 32, "guidance": 1.5,
                "label_drop": 0.1,
            },
            "optimizer": base["optimizer"] | {"decay": 0.1, "schedule": {"name": "constant", "rate": 1e-3, "warmup": 2 if smoke else 100}},
            "ema": base["ema"] | {"target": {"name": "constant", "decay": 0.999}},
            "sample": base["sample"] | {"steps": 4, "sampler": "flow_map", "guidance": "none"},
        }
    )  # fmt: skip
