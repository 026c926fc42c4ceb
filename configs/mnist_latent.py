"""Class-conditional DiT on the latents of the MNIST autoencoder (configs/mnist_vae.py comes first).

    python -m experiments.train --config=configs/mnist_latent.py:data/mnist --workdir=runs/mnist_latent
    python -m experiments.evaluate --checkpoint=runs/mnist_latent
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/mnist"):
    """arg: directory of the prepared data, "smoke:" before it for a few steps of a tiny network."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    return config_dict(
        steps=4 if smoke else 3000,
        batch_size=8 if smoke else 128,
        data={"name": "array_record", "path": path, "pad": 32},
        model={
            "name": "dit", "patch": 2, "width": 32 if smoke else 96, "depth": 1 if smoke else 4, "heads": 2 if smoke else 4,
            "num_classes": 10, "scan": False,
        },
        objective={"name": "flow_matching", "time": {"name": "logit_normal", "stratified": True}, "label_drop": 0.1},
        optimizer={"name": "adamw", "schedule": {"name": "cosine", "rate": 1e-3, "warmup": 2 if smoke else 100}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.999}},
        roles={"vae": {"checkpoint": "runs/mnist_vae/export"}},
        sample={"steps": 4 if smoke else 25, "sampler": "heun", "guidance": {"name": "cfg", "scale": 2.0}, "every": 4 if smoke else 1000},
        evaluate={"count": 20 if smoke else 2000, "metrics": ("frechet", "agreement"), "features": ("pca",)},
        checkpoint={"every": 2 if smoke else 1000},
        validation={"every": 4 if smoke else 500, "batches": 2},
        log={"every": 1 if smoke else 50},
    )
