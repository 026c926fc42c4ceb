"""SiT-XL/2 on ImageNet latents, 256 px (2401.08740): the network and training of DiT-XL/2 with linear path and velocity prediction.

    python -m tools.plan --config=configs/imagenet_sit_xl2.py --topology=v5e:16x16
    python -m experiments.train --config=configs/imagenet_sit_xl2.py:gs://bucket/imagenet_latents --workdir=gs://bucket/sit_xl2

Data: see configs/imagenet_dit_xl2.py. The paper samples 50,000 images with Heun or with Euler-Maruyama, 250 evaluations.
"""

from configs import imagenet_dit_xl2
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/imagenet_latents"):
    """arg: directory of the latents, "smoke:" before it for a few steps of a tiny network on 8x8 latents."""
    base = imagenet_dit_xl2.get_config(arg).to_dict()
    return config_dict(
        **base
        | {
            "model": base["model"] | {"time_scale": 1.0},
            "path": {"name": "rectified"},
            "prediction": "velocity",
            "sample": base["sample"] | {"sampler": "heun", "steps": 4 if arg.startswith("smoke:") else 125},
        }
    )
