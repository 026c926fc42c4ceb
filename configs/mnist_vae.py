"""KL autoencoder for MNIST padded to 32x32, f = 4: 8x8 latents of 4 channels.

    python -m tools.prepare_data --door=npz --path=mnist.npz --out=data/mnist
    python -m experiments.train --config=configs/mnist_vae.py:data/mnist --workdir=runs/mnist_vae
    python -m experiments.export --workdir=runs/mnist_vae        # measures and stores the statistics of the latents
    python -m experiments.evaluate --checkpoint=runs/mnist_vae/export
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/mnist"):
    """arg: directory of the prepared data, "smoke:" before it for a few steps of a tiny network."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    return config_dict(
        steps=4 if smoke else 600,
        batch_size=8 if smoke else 64,
        data={"name": "array_record", "path": path, "pad": 32},
        model={
            "name": "autoencoder_kl", "channels": 8 if smoke else 16, "multipliers": (1, 2, 2), "layers": 1, "latent_channels": 4,
            "groups": 4, "mid_attention": False, "image_channels": 1,
        },
        objective={"name": "vae", "reconstruction": "l1", "kl_weight": 1e-2},
        optimizer={"name": "adamw", "schedule": {"name": "cosine", "rate": 2e-3, "warmup": 1 if smoke else 50}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.99}},
        sample={"every": 4 if smoke else 300},
        checkpoint={"every": 2 if smoke else 300},
        validation={"every": 4 if smoke else 300, "batches": 2},
        log={"every": 1 if smoke else 50},
    )
