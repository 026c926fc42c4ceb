"""Reflow of configs/digits.py, and the one-step student of what comes out (2209.03003, 2309.06380): flow matching on couplings.

    python -m tools.make_couplings --checkpoint=runs/digits --count=20000 --guidance=1.5 --sampler=rk4 --steps=25 --out=data/digits_1
    python -m experiments.train --config=configs/digits_reflow.py:data/digits_1 --workdir=runs/digits_reflow
    python -m tools.make_couplings --checkpoint=runs/digits_reflow --count=20000 --sampler=rk4 --steps=25 --out=data/digits_2
    python -m experiments.train --config=configs/digits_reflow.py:one:data/digits_2 --workdir=runs/digits_one \\
        --config.roles.net.checkpoint=runs/digits_reflow

    python -m experiments.evaluate --checkpoint=runs/digits_one --data=digits

"one:" before the directory trains at t = 1 alone. The couplings are guided, the networks are not guided again. A smaller student, which can
begin as no other network, learns from the same couplings (output distillation, 2101.02388):

    python -m experiments.train --config=configs/digits_reflow.py:one:data/digits_1 --workdir=runs/digits_half \\
        --config.model.width=48 --config.roles.net.checkpoint=

and "perceptual:" is InstaFlow's second stage, which compares images in the features of a network, here a classifier's:

    python -m experiments.train --config=configs/digits_classifier.py:clean --workdir=runs/clean
    python -m experiments.train --config=configs/digits_reflow.py:perceptual:data/digits_2 --workdir=runs/digits_perceptual \\
        --config.roles.net.checkpoint=runs/digits_one
"""

from configs import digits
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/digits_1"):
    """arg: directory of the couplings; before it "smoke:" (a few steps of a tiny network) and "one:" or "perceptual:", in this order."""
    smoke, arg = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    seen, arg = arg.startswith("perceptual:"), arg.removeprefix("perceptual:")
    one, path = seen or arg.startswith("one:"), arg.removeprefix("one:")
    base = digits.get_config("smoke" if smoke else "").to_dict()
    time = {"name": "steps", "count": 1} if one else {"name": "uniform"}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 2000,
            "data": {"name": "array_record", "path": path},
            "objective": {"name": "flow_matching", "time": time | {"stratified": True}} | ({"perceptual_weight": 1.0, "squares": 0.0} if seen else {}),
            "roles": {"net": {"checkpoint": "runs/digits"}} | ({"perceptual": {"checkpoint": "runs/clean"}} if seen else {}),
            "sample": base["sample"] | {"steps": 1 if one else 8, "sampler": "euler", "guidance": "none"},
            "validation": base["validation"] | {"split": "train"},
        }
    )
