"""EDM: its path, preconditioning, log-normal noise levels, weight, and Heun on its grid with churn.

    python -m experiments.train --config=configs/digits_edm.py --workdir=runs/digits_edm
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
            # The network is given log(sigma) / 4 as its time: no factor of a thousand on top.
            "model": base["model"] | {"time_scale": 100.0},
            "path": {"name": "edm"},
            "prediction": "edm",
            "input_scaling": {"name": "edm"},
            "objective": {
                "name": "flow_matching", "time": {"name": "edm_lognormal", "p_mean": -0.4, "p_std": 1.2}, "weight": "edm", "label_drop": 0.1,
            },
            "sample": base["sample"] | {"sampler": {"name": "churn", "churn": 10.0}, "grid": "karras", "steps": 4 if smoke else 18},
        }
    )
