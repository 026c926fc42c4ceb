"""Sample: python -m experiments.sample --checkpoint=<export or workdir> --out=runs/samples [--labels=3,7 --guidance=2 ...]

    python -m experiments.sample --checkpoint=<export or workdir> --prompt="red heart" --prompt="a cat face" [--negative=... --size=64x96]

    python -m experiments.sample --checkpoint=<base> --lora=runs/digits_lora:0.7 --lora=style.safetensors

    python -m experiments.sample --checkpoint=runs/emoji_pixel --prompt="cat face" --enhance=template     # or a text model, or module:function

Settings not given come from the run's config. Writes grid.png and samples.npz (x in [-1, 1], label or prompt, settings). With --enhance
(flowjax.enhance) the network is asked what the prompts became, and samples.npz has both, "prompt" and "enhanced".
"""

import json
import pathlib

import numpy as np
from absl import flags

from experiments import sampling, shell
from flowjax.train import runtime

OUT = flags.DEFINE_string("out", "runs/samples", "Directory for grid.png and samples.npz.")
ENHANCE = flags.DEFINE_string(
    "enhance", "",
    "Rewrite the prompts first: template, the export of a text model (configs/emoji_enhance.py), module:function of your own, or a section.",
)


def enhanced(checkpoint, info, prompts):
    """(what each of the prompts became, its tokens)."""
    from flowjax import enhance
    from flowjax.config import ConfigError, keywords
    from flowjax.data import text
    from flowjax.train import export

    if not prompts:
        raise ConfigError("--enhance rewrites prompts, and this network is asked for none")
    tokenizer = export.tokenizer_of(checkpoint, info)

    def captions(path):
        data = keywords(info["config"]["data"])
        if not path and data["name"] != "array_record":
            raise ConfigError("--enhance=template: the network was trained on no single data set; give \"{'name': 'template', 'captions': PATH}\"")
        return text.captions(path or data["path"], info["config"]["evaluate"]["train_split"])

    section = shell.section(ENHANCE.value, "enhance")
    section = section if isinstance(section, dict) else enhance.parse(section)
    rewrite = enhance.build(section, captions, tokenizer.fits)
    short = list(dict.fromkeys(prompts))
    became = dict(zip(short, rewrite(short)))
    for old, new in became.items():
        print(f"{old} -> {new}" if new != old else f"{old} (as it is)")
    rows = [became[prompt] for prompt in prompts]
    return rows, tokenizer(rows, "--enhance")


def main():
    runtime.setup()
    from flowjax.train import generator, pictures

    checkpoint = sampling.CHECKPOINT.value
    role, params, info = sampling.load()
    seed = sampling.seed(info)
    chosen = sampling.options(info)
    count, cond, prompts = sampling.asked(checkpoint, info, sampling.COUNT.value)
    became = []
    if ENHANCE.value:
        became, tokens = enhanced(checkpoint, info, prompts)
        cond["tokens"] = tokens
    x = generator.build(role, params, info, checkpoint, chosen)(cond, count, seed, sampling.BATCH.value)
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    told = {**sampling.told(chosen), "seed": seed, "checkpoint": checkpoint, "step": info["step"], "weights": info["weights"]}
    said = {"prompt": np.array(prompts)} if prompts else {}
    if became:
        said["enhanced"], told["enhance"] = np.array(became), ENHANCE.value
    np.savez(out / "samples.npz", x=x, settings=json.dumps(told), **cond, **said)
    columns = prompts.count(prompts[0]) if prompts else 10
    pictures.samples(x, out / "grid.png", cond.get("label"), columns)
    print(f"{count} samples: {out / 'grid.png'}, {out / 'samples.npz'}")
    return 0


if __name__ == "__main__":
    shell.run(main)
