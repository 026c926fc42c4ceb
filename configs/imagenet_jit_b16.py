"""JiT-B/16 on ImageNet pixels, 256 px (2511.13720): predicts the image, is trained on the velocity's error, has no autoencoder.

    python -m tools.plan --config=configs/imagenet_jit_b16.py --topology=v5e:8x8
    python -m experiments.train --config=configs/imagenet_jit_b16.py:gs://bucket/imagenet_256 --workdir=gs://bucket/jit_b16

The paper: 600 epochs of batch 1024 at rate 2e-4 after 5 epochs of warm-up, Adam with b2 = 0.95, decay 0.9999 of the average;
50 steps of Heun, guidance 2.9 where its t, our 1 - t, is above 0.1. Its sampler bounds the velocity's denominator by 0.05 as the
loss does, which leaves a trace of noise; ours does not, and the last step ends at the predicted image. At 512 px it has patches of
32 (preset "B/32") and noise of twice the size.
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/imagenet_256"):
    """arg: directory of the images, "smoke:" before it for a few steps of a tiny network on 8x8 images of 4 channels."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    model = {"preset": "B/16", "dtype": "bfloat16"}
    if smoke:
        model = {"depth": 2, "width": 32, "heads": 2, "patch": 4, "bottleneck": 8, "context_from": 1}
    return config_dict(
        steps=4 if smoke else 750_000,
        batch_size=8 if smoke else 1024,
        data={
            "name": "array_record", "path": path, "expect_shape": (8, 8, 4) if smoke else (256, 256, 3), "expect_classes": 1000,
            "flip": not smoke,
        },
        model={"name": "jit", "num_classes": 1000, **model},
        prediction="x",
        objective={
            "name": "flow_matching", "time": {"name": "logit_normal", "mean": 0.8, "std": 0.8, "stratified": True},
            "weight": {"name": "velocity", "floor": 0.05}, "label_drop": 0.1,
        },
        optimizer={"name": "adamw", "b2": 0.95, "schedule": {"name": "constant", "rate": 2e-4, "warmup": 2 if smoke else 6255}},
        ema={"ema": {"name": "constant", "decay": 0.9999}},
        mesh={"data": -1, "fsdp": 1},
        sample={
            "steps": 4 if smoke else 50, "sampler": "heun", "guidance": {"name": "interval", "scale": 2.9, "t_high": 0.9},
            "count": 8 if smoke else 256,
        },
        checkpoint={"every": 2 if smoke else 10_000, "keep_every": 0 if smoke else 100_000},
        log={"every": 1 if smoke else 100},
    )  # fmt: skip
