"""configs/digits.py with hidden tokens aligned to those of the masked autoencoder of configs/digits_mae.py (REPA, 2410.06940).

    python -m experiments.train --config=configs/digits_mae.py --workdir=runs/digits_mae
    python -m experiments.train --config=configs/digits_repa.py --workdir=runs/digits_repa
    python -m experiments.evaluate --checkpoint=runs/digits_repa

The alignment ends in the middle of the run (HASTE, 2505.16792), and with it the encoder's work. HASTE's alignment of attention is

    --config.objective.attention=0.5 --config.objective.layers="(2, 3)" --config.objective.encoder_layers="(3, 4)"
"""

from configs import digits
from flowjax.train.settings import config_dict, words


def get_config(arg: str = ""):
    """arg: "smoke" for a few steps of a tiny network."""
    smoke, base = bool(words(arg, "smoke")), digits.get_config(arg).to_dict()
    projector = {"layer": 1, "features": 24, "hidden": 32} if smoke else {"layer": 2, "features": 64, "hidden": 256}
    return config_dict(
        **base
        | {
            "model": base["model"] | {"projector": projector},
            "objective": base["objective"] | {"name": "repa", "align": 0.5, "stop": 2 if smoke else 1000},
            "roles": {"encoder": {"checkpoint": "runs/digits_mae"}},
        }
    )
