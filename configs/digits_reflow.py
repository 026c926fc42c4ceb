"""Reflow of configs/digits.py, and the one-step student of what comes out (2209.03003, 2309.06380): flow matching on couplings.

    python -m tools.make_couplings --checkpoint=runs/digits --count=20000 --guidance=1.5 --sampler=rk4 --steps=25 --out=data/digits_1
    python -m experiments.train --config=configs/digits_reflow.py:data/digits_1 --workdir=runs/digits_reflow
    python -m tools.make_couplings --checkpoint=runs/digits_reflow --count=20000 --sampler=rk4 --steps=25 --out=data/digits_2
    python -m experiments.train --config=configs/digits_reflow.py:one:data/digits_2 --workdir=runs/digits_one \\
        --config.roles.net.checkpoint=runs/digits_reflow

    python -m experiments.evaluate --checkpoint=runs/digits_one --data=digits

"one:" before the directory trains at t = 1 alone. The couplings are guided, the networks are not guided again.
"""

from configs import digits
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/digits_1"):
    """arg: directory of the couplings, with "smoke:" (a few steps of a tiny network) and "one:" before it, in this order."""
    smoke, arg = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    one, path = arg.startswith("one:"), arg.removeprefix("one:")
    base = digits.get_config("smoke" if smoke else "").to_dict()
    time = {"name": "steps", "count": 1} if one else {"name": "uniform"}
    return config_dict(
        **base
        | {
            "steps": 4 if smoke else 2000,
            "data": {"name": "array_record", "path": path},
            "objective": {"name": "flow_matching", "time": time | {"stratified": True}},
            "roles": {"net": {"checkpoint": "runs/digits"}},
            "sample": base["sample"] | {"steps": 1 if one else 8, "sampler": "euler", "guidance": "none"},
            "validation": base["validation"] | {"split": "train"},
        }
    )
