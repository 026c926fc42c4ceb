"""Class-conditional JiT on the pixels of MNIST, without an autoencoder: patches of 8x8 of images padded to 32x32.

    python -m tools.prepare_data --door=npz --path=mnist.npz --out=data/mnist
    python -m experiments.train --config=configs/mnist_jit.py:data/mnist --workdir=runs/mnist_jit
    python -m experiments.evaluate --checkpoint=runs/mnist_jit

The network predicts the image and is trained on the velocity's error, bounded near the data, as in the paper (2511.13720).
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/mnist"):
    """arg: directory of the prepared data, "smoke:" before it for a few steps of a tiny network."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    return config_dict(
        steps=4 if smoke else 4000,
        batch_size=8 if smoke else 128,
        data={"name": "array_record", "path": path, "pad": 32},
        model={
            "name": "jit", "patch": 8, "width": 32 if smoke else 128, "depth": 2 if smoke else 6, "heads": 4, "bottleneck": 16 if smoke else 32,
            "num_classes": 10, "class_tokens": 4, "context_from": 1 if smoke else 2, "scan": False,
        },
        prediction="x",
        objective={
            "name": "flow_matching", "time": {"name": "logit_normal", "mean": 0.8, "std": 0.8, "stratified": True},
            "weight": {"name": "velocity", "floor": 0.05}, "label_drop": 0.1,
        },
        optimizer={"name": "adamw", "schedule": {"name": "cosine", "rate": 1e-3, "warmup": 2 if smoke else 200}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.999}},
        sample={"steps": 4 if smoke else 25, "sampler": "heun", "guidance": {"name": "cfg", "scale": 2.0}, "every": 4 if smoke else 1000},
        evaluate={"count": 20 if smoke else 2000, "metrics": ("frechet", "agreement"), "features": ("pca",)},
        checkpoint={"every": 2 if smoke else 1000},
        validation={"every": 4 if smoke else 500, "batches": 2},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
