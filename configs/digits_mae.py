"""A masked autoencoder of the 8x8 digits: the encoder of configs/digits_repa.py.

    python -m experiments.train --config=configs/digits_mae.py --workdir=runs/digits_mae
"""

from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke = bool(words(arg, "smoke"))
    return config_dict(
        steps=4 if smoke else 3000,
        batch_size=16 if smoke else 128,
        data={"name": "digits"},
        model={
            "name": "mae",
            "encoder": {
                "patch": 2, "width": 24 if smoke else 64, "depth": 1 if smoke else 4, "heads": 2 if smoke else 4, "positions": "sincos",
                "mean": (0.5,), "std": (0.5,),
            },
            "decoder": {"width": 16 if smoke else 32, "depth": 1 if smoke else 2, "heads": 2},
        },
        objective={"name": "mae", "mask_ratio": 0.75},
        optimizer={
            "name": "adamw", "b2": 0.95, "decay": 0.05, "schedule": {"name": "cosine", "rate": 1e-3, "warmup": 2 if smoke else 200},
        },
        ema={"ema": {"name": "warmup", "decay": 0.999}},
        checkpoint={"every": 2 if smoke else 1000},
        validation={"every": 4 if smoke else 500, "batches": 2},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
