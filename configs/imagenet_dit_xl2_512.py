"""DiT-XL/2 on ImageNet latents, 512 px (2212.09748): 1,024 tokens of 64x64x4 latents.

    python -m tools.plan --config=configs/imagenet_dit_xl2_512.py --topology=v5e:16x16
    python -m experiments.train --config=configs/imagenet_dit_xl2_512.py:gs://bucket/imagenet512_latents --workdir=gs://bucket/dit_xl2_512

Data: see configs/imagenet_dit_xl2.py. The paper trains 3 M steps.
"""

from configs import imagenet_dit_xl2
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/imagenet512_latents"):
    """arg: directory of the latents, "smoke:" before it for a few steps of a tiny network on 8x8 latents."""
    base = imagenet_dit_xl2.get_config(arg).to_dict()
    if arg.startswith("smoke:"):
        return config_dict(**base)
    return config_dict(**base | {"steps": 3_000_000, "data": base["data"] | {"expect_shape": (64, 64, 4)}})
