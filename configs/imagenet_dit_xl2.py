"""DiT-XL/2 on ImageNet latents, 256 px (2212.09748): noise prediction, bfloat16, FSDP.

    python -m tools.plan --config=configs/imagenet_dit_xl2.py --topology=v5e:16x16
    python -m experiments.train --config=configs/imagenet_dit_xl2.py:gs://bucket/imagenet_latents --workdir=gs://bucket/dit_xl2

The paper trains 7 M steps of batch 256 at rate 1e-4 without decay or warm-up, and averages with decay 0.9999. The data are
latents of an f = 8 autoencoder, standardised per channel, as records {"x": float16 or float32 (32, 32, 4), "label"}.
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/imagenet_latents"):
    """arg: directory of the latents, "smoke:" before it for a few steps of a tiny network on 8x8 latents."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    model = {"preset": "XL/2", "dtype": "bfloat16"}
    if smoke:
        model = {"depth": 2, "width": 32, "heads": 2}
    return config_dict(
        steps=4 if smoke else 7_000_000,
        batch_size=8 if smoke else 256,
        data={"name": "array_record", "path": path, "expect_shape": (8, 8, 4) if smoke else (32, 32, 4), "expect_classes": 1000},
        model={"name": "dit", "num_classes": 1000, "learn_sigma": True, "remat": "dots", **model},
        path={"name": "vp_linear"},
        prediction="eps",
        objective={"name": "flow_matching", "time": {"name": "uniform", "stratified": True}, "weight": "none", "label_drop": 0.1},
        optimizer={"name": "adamw", "schedule": {"name": "constant", "rate": 1e-4}},
        ema={"ema": {"name": "constant", "decay": 0.9999}},
        mesh={"data": -1, "fsdp": 1 if smoke else 16},
        sample={"steps": 4 if smoke else 250, "sampler": "ancestral", "guidance": {"name": "cfg", "scale": 1.5}, "count": 8 if smoke else 256},
        checkpoint={"every": 2 if smoke else 10_000, "keep_every": 0 if smoke else 100_000},
        log={"every": 1 if smoke else 100},
    )
