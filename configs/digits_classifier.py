"""A classifier of noisy digits, for classifier guidance; with the arg "clean", of clean ones, for evaluation.

    python -m experiments.train --config=configs/digits_classifier.py --workdir=runs/digits_classifier
    python -m experiments.sample --checkpoint=runs/digits --guidance="{'name': 'classifier', 'scale': 2.0, 'checkpoint': 'runs/digits_classifier'}"
    python -m experiments.evaluate --checkpoint=runs/digits --features="{'name': 'network', 'checkpoint': 'runs/clean'}"
"""

from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps, "clean" for a classifier of clean images."""
    ways = words(arg, "smoke", "clean")
    smoke = "smoke" in ways
    return config_dict(
        steps=4 if smoke else 600,
        batch_size=16 if smoke else 128,
        data={"name": "digits"},
        model={"name": "classifier", "num_classes": 10, "width": 8 if smoke else 16, "stages": 2, "features": 64, "time": "clean" not in ways},
        objective={"name": "classification", "shift": 1, "smoothing": 0.1},
        optimizer={"name": "adamw", "schedule": {"name": "cosine", "rate": 2e-3, "warmup": 1 if smoke else 50}},
        ema={"ema": {"name": "warmup", "decay": 0.99}},
        checkpoint={"every": 2 if smoke else 300},
        validation={"every": 4 if smoke else 300, "batches": 2},
        log={"every": 1 if smoke else 50},
    )
