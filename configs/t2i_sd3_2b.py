"""SD3 medium, 2 billion parameters, at 1024 px (2403.03206): the last stage of pre-training, on cached latents and embeddings.

    python -m tools.plan --config=configs/t2i_sd3_2b.py --topology=v5p:8x4x4
    python -m experiments.train --config=configs/t2i_sd3_2b.py:gs://bucket/latents_1024 --workdir=gs://bucket/sd3_2b

On 128 v5p a step of 1024 images takes 12.9 of 95.7 GiB a device (tools.plan).

Records {"x": (128, 128, 16), "text": (154, 4096), "pooled": (2048,)}: standardised latents of an f = 8 autoencoder; for each
caption 77 tokens of CLIP L and G side by side, padded with zeros to 4096 channels, then 77 of T5-XXL; both pooled vectors of CLIP:
what tools.encode_latents makes with --vae and --text=exports/sd3_text of

    python -m tools.convert_weights --from=diffusers --model=sd3_text --fields="{'lengths': (77, 77, 77)}" sd3-medium exports/sd3_text

The paper trains 500,000 steps of batch 4096 at 256 px first, without the shift; each of its three encoders is left out with
probability 0.464, where here, as no encoder need be there, the whole condition is left out with 0.1. As in the paper it is with

    --config.roles="{'text': {'checkpoint': 'exports/sd3_text', 'drop': 0.464}}" --config.objective.label_drop=0.0
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/latents_1024"):
    """arg: directory of the records, "smoke:" before it for a few steps of a tiny network on 8x8 latents."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    model = {"preset": "sd3_medium", "dtype": "bfloat16", "remat": "attention"}
    data = {"expect_shape": (128, 128, 16), "expect_cond": {"text": (154, 4096), "pooled": (2048,)}}
    if smoke:
        model = {"depth": 2, "width": 32, "heads": 2, "table": 8, "base": 8}
        data = {"expect_shape": (8, 8, 4), "expect_cond": {"text": (6, 12), "pooled": (10,)}}
    return config_dict(
        steps=4 if smoke else 100_000,
        batch_size=8 if smoke else 1024,
        data={"name": "array_record", "path": path, "expect_classes": 0, **data},
        model={"name": "mmdit", **model},
        prediction="velocity",
        objective={
            "name": "flow_matching",
            "time": {"name": "logit_normal", "shift": 3.0, "stratified": True},  # section 5.3.2: 3 at 1024 px
            "label_drop": 0.1,
        },
        optimizer={"name": "adamw", "schedule": {"name": "constant", "rate": 1e-4, "warmup": 2 if smoke else 1000}, "clip": 1.0},
        ema={"ema": {"name": "constant", "decay": 0.9999}},
        mesh={"data": -1, "fsdp": 1 if smoke else 16},
        sample={
            "steps": 4 if smoke else 28, "sampler": "euler", "grid": {"name": "uniform", "shift": 3.0},
            "guidance": {"name": "cfg", "scale": 5.0}, "count": 8 if smoke else 128,
        },
        checkpoint={"every": 2 if smoke else 5_000, "keep_every": 0 if smoke else 50_000},
        log={"every": 1 if smoke else 100},
    )  # fmt: skip
