"""Inductive moment matching (IMM, 2503.07565) on digits: a flow map trained from nothing, for one step or a few.

    python -m experiments.train --config=configs/digits_imm.py --workdir=runs/digits_imm
    python -m experiments.evaluate --checkpoint=runs/digits_imm

Sampling begins where training ends, at t = 0.994, and is guided as that of a diffusion model. Groups of one label,
--config.objective.by_label=True, are no better here: after 1,500 steps, in two, unguided, 90.8 % class agreement and 1.96 of the training
images' distance, instead of 94.6 % and 2.13 (one seed, experiments.evaluate --guidance=none --count=500).
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
            "objective": {"name": "inductive_moment_matching", "particles": 4, "label_drop": 0.1},
            "optimizer": base["optimizer"] | {"b2": 0.99, "schedule": {"name": "constant", "rate": 1e-3, "warmup": 2 if smoke else 100}},
            "sample": base["sample"] | {"steps": 2, "sampler": "flow_map", "grid": {"name": "uniform", "t_start": 0.994}},
        }
    )  # fmt: skip
