"""Four Gaussians in the plane: rectified flow with an MLP. The smallest run there is.

    python -m experiments.train --config=configs/mix4.py --workdir=runs/mix4
"""

from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps."""
    smoke = bool(words(arg, "smoke"))
    return config_dict(
        steps=4 if smoke else 3000,
        batch_size=64 if smoke else 1024,
        data={"name": "mix4"},
        model={"name": "mlp", "width": 128, "depth": 3, "num_classes": 4},
        objective={"name": "flow_matching", "time": {"name": "uniform", "stratified": True}, "label_drop": 0.1},
        optimizer={"name": "adamw", "schedule": {"name": "cosine", "rate": 2e-3, "warmup": 1 if smoke else 100}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.999}},
        sample={"steps": 20, "every": 2 if smoke else 1000, "count": 64 if smoke else 2000},
        checkpoint={"every": 2 if smoke else 1000},
        validation={"every": 2 if smoke else 500, "batches": 2},
        log={"every": 1 if smoke else 50},
    )
