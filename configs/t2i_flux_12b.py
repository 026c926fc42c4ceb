"""FLUX.1's network, 12 billion parameters, at 1024 px, trained from nothing: parameters split over 64 devices.

    python -m tools.plan --config=configs/t2i_flux_12b.py --topology=v5p:8x8x4
    python -m experiments.train --config=configs/t2i_flux_12b.py:gs://bucket/latents_flux --workdir=gs://bucket/flux_12b

On 256 v5p a step of 1024 images takes 18 of 95.7 GiB a device (tools.plan).

Records {"x": (128, 128, 16), "text": (512, 4096), "pooled": (768,)}: standardised latents of an f = 8 autoencoder; for each
caption 512 tokens of T5-XXL and the pooled vector of CLIP L (tools.encode_latents, --text being what tools.convert_weights makes
with --model=flux_text of the published pipeline). How the published weights were trained is not known; their sampler
shifts time by exp(1.15) at 4096 tokens, which training does here as well. The scale of guidance becomes an input
(model.guidance_embed) only when a guided model is distilled (objective guidance_distillation, as in configs/digits_gd.py).
"""

import math

from configs import t2i_sd3_2b
from flowjax import times
from flowjax.train.settings import config_dict


def get_config(arg: str = "data/latents_flux"):
    """arg: directory of the records, "smoke:" before it for a few steps of a tiny network on 8x8 latents."""
    base = t2i_sd3_2b.get_config(arg).to_dict()
    model = {"name": "flux", "preset": "flux1_schnell", "dtype": "bfloat16", "remat": "full"}
    data = base["data"] | {"expect_cond": {"text": (512, 4096), "pooled": (768,)}}
    mesh = {"data": -1, "fsdp": 64}
    if arg.startswith("smoke:"):
        model = {"name": "flux", "depth": 1, "single_depth": 2, "width": 32, "heads": 2, "rope_axes": (4, 6, 6)}
        data, mesh = base["data"], base["mesh"]
    shift = {"shift": math.exp(times.flux_mu(64 * 64))}
    objective = base["objective"] | {"time": base["objective"]["time"] | shift}
    sample = base["sample"] | {"grid": base["sample"]["grid"] | shift}
    return config_dict(**base | {"model": model, "data": data, "mesh": mesh, "objective": objective, "sample": sample})
