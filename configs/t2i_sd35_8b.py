"""SD3.5 large, 8 billion parameters, at 1024 px (2403.03206 with norms of queries and keys): parameters split over 64 devices.

    python -m tools.plan --config=configs/t2i_sd35_8b.py --topology=v5p:8x8x4
    python -m experiments.train --config=configs/t2i_sd35_8b.py:gs://bucket/latents_1024 --workdir=gs://bucket/sd35_8b

On 256 v5p a step of 1024 images takes 13 of 95.7 GiB a device (tools.plan).

Data: see configs/t2i_sd3_2b.py.
"""

from configs import t2i_sd3_2b
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/latents_1024"):
    """arg: directory of the records, "smoke:" before it for a few steps of a tiny network on 8x8 latents."""
    base = t2i_sd3_2b.get_config(arg).to_dict()
    if arg.startswith("smoke:"):
        return config_dict(**base | {"model": base["model"] | {"qk_norm": True}})
    model = base["model"] | {"preset": "sd35_large", "remat": "full"}
    return config_dict(**base | {"model": model, "mesh": {"data": -1, "fsdp": 64}})
