"""Class-conditional DiT on the 8x8 digits by rectified flow: the quick start.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.evaluate --checkpoint=runs/digits
"""

from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke = bool(words(arg, "smoke"))
    return config_dict(
        steps=4 if smoke else 2000,
        batch_size=16 if smoke else 128,
        data={"name": "digits"},
        model={
            "name": "dit", "patch": 2, "width": 32 if smoke else 96, "depth": 1 if smoke else 4, "heads": 2 if smoke else 4,
            "num_classes": 10,
            # Four layers compile fast enough unrolled, and a CPU then copies no stacked activations (a third less time a step).
            "scan": False,
        },
        objective={"name": "flow_matching", "time": {"name": "uniform", "stratified": True}, "label_drop": 0.1},
        optimizer={"name": "adamw", "schedule": {"name": "cosine", "rate": 1e-3, "warmup": 2 if smoke else 100}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.999}},
        sample={"steps": 4 if smoke else 25, "sampler": "heun", "guidance": {"name": "cfg", "scale": 1.5}, "every": 4 if smoke else 500},
        evaluate={"count": 40 if smoke else 1000, "metrics": ("frechet", "agreement", "memorisation"), "features": ("pixels",)},
        checkpoint={"every": 2 if smoke else 1000},
        validation={"every": 4 if smoke else 500, "batches": 2},
        log={"every": 1 if smoke else 50},
    )
