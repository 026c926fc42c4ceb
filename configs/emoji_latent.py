"""Text to image on latents: a small MMDiT on the 16x16x4 latents of 64x64 emoji, made once; its text encoder learned along.

    python -m experiments.train --config=configs/emoji_vae.py:gan:data/emoji --workdir=runs/emoji_vae
    python -m experiments.export --workdir=runs/emoji_vae
    python -m tools.encode_latents --vae=runs/emoji_vae/export --out=data/emoji_latents
    python -m experiments.train --config=configs/emoji_latent.py:data/emoji --workdir=runs/emoji_latent
    python -m experiments.sample --checkpoint=runs/emoji_latent --prompt="red heart" --prompt="a cat face"

data/emoji and its tokenizer.json as for configs/emoji_pixel.py. With a frozen text encoder instead, captions are embedded along
with the images (tools.encode_latents --text=...): then data.text and model.text_encoder go, and roles.text embeds prompts.
"""

from flowjax.train.settings import config_dict


def get_config(arg: str = "data/emoji"):
    """arg: directory of the prepared data, with the latents in <arg>_latents; "smoke:" before it for a few steps of a tiny network."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    width = 32 if smoke else 128
    return config_dict(
        steps=4 if smoke else 3000,
        batch_size=8 if smoke else 64,
        data={
            "name": "array_record", "path": f"{path}_latents",
            "text": {"name": "file", "path": f"{path}/tokenizer.json", "length": 24},
        },
        model={
            "name": "mmdit", "patch": 2, "width": width, "depth": 2 if smoke else 6, "heads": 4, "table": 16, "base": 16, "scan": False,
            "text_encoder": {"vocab": 2000, "length": 24, "width": width, "depth": 1 if smoke else 2, "heads": 4},
        },
        objective={"name": "flow_matching", "time": {"name": "logit_normal", "stratified": True}, "label_drop": 0.1},
        optimizer={"name": "adamw", "schedule": {"name": "constant", "rate": 1e-3, "warmup": 2 if smoke else 200}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.999}},
        roles={"vae": {"checkpoint": "runs/emoji_vae/export"}},
        sample={
            "steps": 4 if smoke else 25, "sampler": "heun", "guidance": {"name": "cfg", "scale": 2.0}, "every": 4 if smoke else 1000,
            "count": 8 if smoke else 64,
        },
        evaluate={"count": 16 if smoke else 160, "metrics": ("frechet",), "features": ({"name": "pca", "dim": 4 if smoke else 64},)},
        checkpoint={"every": 2 if smoke else 500},
        validation={"every": 4 if smoke else 500, "batches": 1 if smoke else 2},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
