"""Sample: python -m experiments.sample --checkpoint=<export or workdir> --out=runs/samples [--labels=3,7 --guidance=2 ...]

Settings not given come from the run's config. Writes grid.png and samples.npz (x in [-1, 1], label, settings).
"""

import json
import pathlib

import numpy as np
from absl import flags

from experiments import sampling, shell
from flowjax.train import runtime

OUT = flags.DEFINE_string("out", "runs/samples", "Directory for grid.png and samples.npz.")


def main():
    runtime.setup()
    from flowjax.train import export, generator, pictures

    checkpoint = sampling.CHECKPOINT.value
    role, params, info = export.load(checkpoint, sampling.WEIGHTS.value)
    section = info["config"]["sample"]
    count = sampling.COUNT.value or section["count"]
    seed = section["seed"] if sampling.SEED.value < 0 else sampling.SEED.value
    chosen = sampling.options(info)
    cond = sampling.asked(info, count)
    x = generator.build(role, params, info, checkpoint, chosen)(cond, count, seed, sampling.BATCH.value)
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    told = {**chosen, "seed": seed, "checkpoint": checkpoint, "step": info["step"], "weights": info["weights"]}
    np.savez(out / "samples.npz", x=x, settings=json.dumps(told), **cond)
    pictures.samples(x, out / "grid.png", cond.get("label"))
    print(f"{count} samples: {out / 'grid.png'}, {out / 'samples.npz'}")
    return 0


if __name__ == "__main__":
    shell.run(main)
