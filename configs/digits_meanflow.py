"""MeanFlow (2505.13447) on digits: a network of mean velocities, trained from nothing, that takes one step.

    python -m experiments.train --config=configs/digits_meanflow.py --workdir=runs/digits_meanflow
    python -m experiments.evaluate --checkpoint=runs/digits_meanflow

Guidance is in the targets (scale 1, mix 0.5: an effective 2), so the samples are not guided again. Time is not multiplied by 1,000:
the loss has the network's derivative by it.
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
            "model": base["model"] | {"step_embed": True, "time_scale": 1.0},
            "objective": {
                "name": "meanflow", "time": {"name": "logit_normal", "mean": -0.4, "std": 1.0, "stratified": True}, "same": 0.75,
                "scale": 1.0, "mix": 0.5, "label_drop": 0.1,
            },
            "optimizer": base["optimizer"] | {"b2": 0.95, "schedule": {"name": "constant", "rate": 1e-3, "warmup": 2 if smoke else 100}},
            "sample": base["sample"] | {"steps": 1, "sampler": "flow_map", "guidance": "none"},
        }
    )  # fmt: skip
