"""Text to image on pixels, without an autoencoder: a small JiT on 64x64 emoji, its text encoder learned along.

    python -m tools.prepare_data --door=folder --path=emoji --out=data/emoji --size=64 --channels=3 --holdout=0.05
    python -m tools.train_tokenizer --path=data/emoji --vocab=2000
    python -m experiments.train --config=configs/emoji_pixel.py:data/emoji --workdir=runs/emoji_pixel
    python -m experiments.sample --checkpoint=runs/emoji_pixel --prompt="red heart" --prompt="a cat face"

In two stages of resolution, the first on a quarter of the tokens, its times shifted towards the data by as much as these need:

    python -m experiments.train --config=configs/emoji_pixel.py:32:data/emoji --workdir=runs/emoji_pixel_32
    python -m experiments.train --config=configs/emoji_pixel.py:data/emoji --workdir=runs/emoji_pixel \\
        --config.roles="{'net': {'checkpoint': 'runs/emoji_pixel_32'}}"

Of 100 captions an independent judge finds the right one for 75 % of the images made from training captions and 61 % of those made from
held-out ones (guidance 3, one seed: python -m experiments.study emoji --seeds=1; 50 minutes of training on one core).

The patches have 8 x 8 x 3 = 192 numbers, more than the network is wide: the prediction is the image, the loss the velocity's,
bounded near the data as the paper's is (JiT 2511.13720, whose t runs the other way: its logit-normal has mean -0.8).
"""

from flowjax import times
from flowjax.train.settings import config_dict

SIZE, PATCH = 64, 8


def get_config(arg: str = "data/emoji"):
    """arg: directory of the prepared data; before it "smoke:" for a few steps of a tiny network, "32:" for images of that size."""
    smoke, path = arg.startswith("smoke:"), arg.removeprefix("smoke:")
    stage, _, rest = path.partition(":")
    size, path = (int(stage), rest) if stage.isdigit() else (SIZE, path)
    width = 32 if smoke else 128
    return config_dict(
        steps=4 if smoke else 3000,
        batch_size=8 if smoke else 64,
        data={
            "name": "array_record", "path": path, "resize": 0 if size == SIZE else size,
            "text": {"name": "file", "path": f"{path}/tokenizer.json", "length": 24},
        },
        model={
            "name": "jit", "patch": PATCH, "width": width, "depth": 2 if smoke else 6, "heads": 4, "bottleneck": 16 if smoke else 64,
            "context_from": 1 if smoke else 2, "scan": False,
            "text_encoder": {"vocab": 2000, "length": 24, "width": width, "depth": 1 if smoke else 2, "heads": 4},
        },
        prediction="x",
        objective={
            "name": "flow_matching",
            "time": {
                "name": "logit_normal", "mean": 0.8, "std": 0.8, "stratified": True,
                "shift": times.resolution_shift((size // PATCH) ** 2, (SIZE // PATCH) ** 2),
            },
            "weight": {"name": "velocity", "floor": 0.05}, "label_drop": 0.1,
        },
        optimizer={"name": "adamw", "schedule": {"name": "constant", "rate": 1e-3, "warmup": 2 if smoke else 200}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.999}},
        sample={
            "steps": 4 if smoke else 25, "sampler": "heun", "guidance": {"name": "cfg", "scale": 2.0}, "every": 4 if smoke else 1000,
            "count": 8 if smoke else 64,
        },
        evaluate={"count": 16 if smoke else 160, "metrics": ("frechet",), "features": ({"name": "pca", "dim": 4 if smoke else 64},)},
        checkpoint={"every": 2 if smoke else 500},
        validation={"every": 4 if smoke else 500, "batches": 1 if smoke else 2},
        log={"every": 1 if smoke else 50},
    )  # fmt: skip
