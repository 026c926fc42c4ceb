"""Images that a checkpoint makes, as a data set: those of its class, for example, that prior preservation rehearses (DreamBooth).

    python -m tools.make_images --checkpoint=runs/digits --labels=3 --count=200 --guidance=1.5 --out=data/digits_prior
    python -m tools.make_images --checkpoint=runs/emoji_pixel --prompt="cat face" --count=200 --out=data/cats

They are 8-bit images with what was asked for (label, caption or both), in split "train". Sample them as the network will be used.
"""

import numpy as np
from absl import flags

from experiments import sampling, shell
from flowjax.train import runtime

OUT = flags.DEFINE_string("out", None, "Directory of the data set to write.", required=True)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --out holds.")


def main():
    runtime.setup()
    from flowjax.data import records
    from flowjax.evals import image
    from flowjax.train import generator

    checkpoint = sampling.CHECKPOINT.value
    role, params, info = sampling.load()
    seed, chosen = sampling.seed(info), sampling.options(info)
    count, cond, prompts = sampling.asked(checkpoint, info, sampling.COUNT.value)
    x = image.quantise(generator.build(role, params, info, checkpoint, chosen)(cond, count, seed, sampling.BATCH.value), sampled=True)
    said = {k: np.asarray(v) for k, v in cond.items() if k == "label"} | ({"caption": prompts} if prompts else {})
    rows = (("train", f"image {i}", {"image": x[i], **{k: v[i] for k, v in said.items()}}) for i in range(count))
    source = {"checkpoint": str(checkpoint), "step": info["step"], "weights": info["weights"], "seed": seed, **sampling.told(chosen)}
    classes = info["num_classes"] if "label" in said else 0
    made = records.write(OUT.value, rows, name="images", num_classes=classes, source={"images": source}, overwrite=OVERWRITE.value)
    print(f"{made['splits']['train']['count']} images of shape {tuple(made['image_shape'])} in {OUT.value}")
    return 0


if __name__ == "__main__":
    shell.run(main)
