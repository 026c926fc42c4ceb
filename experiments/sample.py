"""Sample: python -m experiments.sample --checkpoint=<export or workdir> --out=runs/samples [--labels=3,7 --guidance=2 ...]

    python -m experiments.sample --checkpoint=<export or workdir> --prompt="red heart" --prompt="a cat face" [--negative=... --size=64x96]

    python -m experiments.sample --checkpoint=<base> --lora=runs/digits_lora:0.7 --lora=style.safetensors

Settings not given come from the run's config. Writes grid.png and samples.npz (x in [-1, 1], label or prompt, settings).
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
    from flowjax.train import generator, pictures

    checkpoint = sampling.CHECKPOINT.value
    role, params, info = sampling.load()
    section = info["config"]["sample"]
    seed = section["seed"] if sampling.SEED.value < 0 else sampling.SEED.value
    chosen = sampling.options(info)
    count, cond, prompts = sampling.asked(checkpoint, info, sampling.COUNT.value)
    x = generator.build(role, params, info, checkpoint, chosen)(cond, count, seed, sampling.BATCH.value)
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    told = {**sampling.told(chosen), "seed": seed, "checkpoint": checkpoint, "step": info["step"], "weights": info["weights"]}
    said = {"prompt": np.array(prompts)} if prompts else {}
    np.savez(out / "samples.npz", x=x, settings=json.dumps(told), **cond, **said)
    columns = prompts.count(prompts[0]) if prompts else 10
    pictures.samples(x, out / "grid.png", cond.get("label"), columns)
    print(f"{count} samples: {out / 'grid.png'}, {out / 'samples.npz'}")
    return 0


if __name__ == "__main__":
    shell.run(main)
