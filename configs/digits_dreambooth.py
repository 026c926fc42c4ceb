"""DreamBooth on the digits (2208.12242): five images of a subject, under the class 3, with prior preservation, as a LoRA.

    python -m tools.make_images --checkpoint=runs/digits --labels=3 --count=200 --guidance=1.5 --out=data/digits_prior
    python -m experiments.train --config=configs/digits_dreambooth.py:data/digits_prior --workdir=runs/digits_dreambooth
    python -m experiments.train --config=configs/digits_dreambooth.py:data/digits_prior --workdir=runs/digits_dreambooth_0 \\
        --config.objective.prior=0.0                                                    # without: what the class was is forgotten

Half of the rows are the subject's, the others what the network made of the class before; the loss is the sum of their two
means. A network of captions takes a rare word for the subject; the classes of this one are all in use, so that subject and
class share one.
"""

from configs import digits_lora
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/digits_prior"):
    """arg: the images of the class; before it "smoke:" for a few steps. The network is that of configs/digits.py."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    base = digits_lora.get_config("smoke" if smoke else "").to_dict()
    subject, rehearsed = {"name": "digits", "classes": (3,), "limit": 5}, {"name": "array_record", "path": path}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 400,
            "data": {"name": "mixture", "parts": (subject, rehearsed), "weights": (1.0, 1.0), "prior": (1,)},
            "objective": {**base["objective"], "prior": 1.0},
            "validation": {"every": 0},
        }
    )
