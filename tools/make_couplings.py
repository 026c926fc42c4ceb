"""Couplings from a checkpoint: the noise z and the x that its flow makes of it, for reflow and for one-step students.

    python -m tools.make_couplings --checkpoint=runs/digits --count=20000 --guidance=2 --sampler=rk4 --steps=25 --out=data/digits_couplings
    python -m experiments.train --config=configs/digits_reflow.py:data/digits_couplings --workdir=runs/digits_reflow

Classes are asked for in turn, or captions of the training data (each image's first). For a network of latents x is a latent: train on
it with the same roles.vae. What is written has split "train".
"""

import numpy as np
from absl import flags

from experiments import sampling, shell
from flowjax.train import runtime

OUT = flags.DEFINE_string("out", None, "Directory of the couplings to write.", required=True)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --out holds.")
# A coupling is a map: the same noise must always give the same x.
MAPS = ("euler", "midpoint", "heun", "rk4", "ddim", "dpmpp_2m", "adaptive")
CHUNK = 2000  # samples held at a time


def captions(info, count: int) -> list[str]:
    """First captions of the training split, in turn."""
    from flowjax.data import text
    from flowjax.data.pipeline import ordered

    _, batches = ordered(text.without(info["config"]["data"]), "train", CHUNK)
    found = []
    for _, _, others in batches:
        found += [c.split("\n")[0] for c in others["caption"]]
        if len(found) >= count:
            break
    return [found[i % len(found)] for i in range(count)]


def main():
    runtime.setup()
    from flowjax import generate
    from flowjax.config import ConfigError, split
    from flowjax.data import records
    from flowjax.train import export, generator

    for flag in (sampling.PROMPT, sampling.PROMPTS, sampling.INIT, sampling.SIZE):
        if flag.value:
            raise ConfigError(f"--{flag.name} means nothing here: couplings are of what the network was trained on")
    checkpoint = sampling.CHECKPOINT.value
    role, params, info = sampling.load()
    chosen = sampling.options(info)
    name, settings = split(chosen["sampler"], "sampler")
    if name not in MAPS or settings.get("eta"):
        raise ConfigError(f"--sampler={chosen['sampler']} draws noise on the way, so that z does not decide x; valid: {', '.join(MAPS)}")
    count, seed = sampling.COUNT.value or info["config"]["sample"]["count"], sampling.seed(info)
    make = generator.build(role, params, info, checkpoint, chosen, decode=False)
    classes = 0
    if info.get("text") and info["model"].get("num_classes"):
        raise ConfigError("couplings hold a class or a caption; this network is asked by both")
    if info.get("text"):
        texts = captions(info, count)
        cond, columns = {"tokens": export.tokenizer_of(checkpoint, info)(texts, "captions")}, {"caption": texts}
    else:
        cond = columns = sampling.labels(info, count)
        classes = info["num_classes"] if cond else 0

    def examples():
        for start in range(0, count, CHUNK):
            rows = np.arange(start, min(start + CHUNK, count))
            part = {k: np.asarray(v)[rows] for k, v in cond.items()}
            x = make(part, len(rows), seed, sampling.BATCH.value, first=start)
            z = np.asarray(generate.noise(seed, rows, x.shape[1:]))
            for i, row in enumerate(rows):
                yield "train", f"coupling {row}", {"x": x[i], "z": z[i], **{k: v[row] for k, v in columns.items()}}

    source = {"couplings": {"checkpoint": checkpoint, "step": info["step"], "seed": seed, **sampling.told(chosen)}}
    if info.get("latent_space"):
        source["latents"] = {"vae": info["latent_space"]}
    made = records.write(OUT.value, examples(), name="couplings", num_classes=classes, source=source, overwrite=OVERWRITE.value)
    print(f"{made['splits']['train']['count']} couplings of shape {tuple(made['image_shape'])} in {OUT.value}")
    return 0


if __name__ == "__main__":
    shell.run(main)
