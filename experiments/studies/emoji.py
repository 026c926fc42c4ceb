"""Text to image on emoji, without an autoencoder: does an independent network find the caption that was asked for?

    python -m experiments.study emoji --data=data/emoji      (made as configs/emoji_pixel.py says)

The judge is a pair of towers trained contrastively on the same images with a seed of its own; what it makes of real images,
of the training and of the held-out split, stands beside what it makes of generated ones.
"""

import functools

import numpy as np
from absl import flags

from experiments.studies import common
from flowjax.train import runtime

COUNT = flags.DEFINE_integer("captions", 100, "Captions to choose among, each asked for once.", lower_bound=2)
SCALES = (1.0, 2.0, 3.0, 5.0)
PROMPTS = ("heavy black heart", "cat face", "rainbow", "slice of pizza", "grinning face", "woman", "woman with dark skin tone", "rabbit face")


def distinct(part, count: int, seed: int):
    """(images, tokens, captions) of `count` examples with different captions, drawn with `seed`."""
    order = np.random.default_rng(seed).permutation(len(part["x"]))
    _, first = np.unique(np.array(part["caption"], object)[order].astype(str), return_index=True)
    chosen = order[np.sort(first)][:count]
    return part["x"][chosen], part["cond"]["tokens"][chosen], [part["caption"][i] for i in chosen]


def data() -> str:
    """Where the prepared data set lies, with tokenizer.json."""
    return common.DATA.value or "data/emoji"


def teacher(seed: int):
    """A finished run of configs/emoji_pixel.py."""
    return common.train(f"emoji_pixel/{seed}", common.config("emoji_pixel", data(), seed=seed))


@functools.cache
def judge():
    """The two towers."""
    from flowjax.train import export

    role, params, _ = export.load(common.train("emoji_clip", common.config("emoji_clip", data())))
    return role.net(params)


def score(x, tokens) -> float:
    """How often, in percent, the judge finds the right caption of an image among all of them."""
    from flowjax.evals import retrieval

    return 100 * retrieval.retrieval(retrieval.similarities(judge(), x, tokens))


def scores(workdir, section, *, seed: int, **options) -> dict:
    """{split: score} of what a network makes of captions of both splits; options as common.draw has them."""
    from flowjax.data.pipeline import arrays

    found = {}
    for split in ("train", "test"):
        _, tokens, _ = distinct(arrays(section, split), COUNT.value, seed)
        found[split] = score(np.clip(common.draw(workdir, {"tokens": tokens}, len(tokens), seed=seed, **options), -1, 1), tokens)
    return found


def main():
    runtime.setup()
    from flowjax.data.pipeline import arrays
    from flowjax.train import export, generator, pictures

    runs = [teacher(seed) for seed in range(common.SEEDS.value)]
    section = export.info_of(runs[0])["config"]["data"]
    splits = {name: arrays(section, name) for name in ("train", "test")}
    rows = []
    for split, part in splits.items():
        sets = [distinct(part, COUNT.value, seed) for seed in range(common.SEEDS.value)]
        rows.append([f"real images, {split}", "", common.spread([score(x, tokens) for x, tokens, _ in sets])])
        for scale in SCALES:
            found = []
            for seed, (run, (_, tokens, _)) in enumerate(zip(runs, sets)):
                guidance = "none" if scale == 1 else {"name": "cfg", "scale": scale}
                x = generator.load(run, settings={"guidance": guidance})({"tokens": tokens}, len(tokens), seed)
                found.append(score(np.clip(x, -1, 1), tokens))
            rows.append([f"generated, captions of {split}", scale, common.spread(found)])
            print(rows[-1], flush=True)
    make = generator.load(runs[0])
    tokens = export.tokenizer_of(runs[0], make.info)(PROMPTS)
    x = make({"tokens": np.repeat(tokens, 4, 0)}, 4 * len(PROMPTS), 0)
    x = x.reshape(len(PROMPTS), 4, *x.shape[1:]).swapaxes(0, 1).reshape(-1, *x.shape[1:])  # a column a prompt
    pictures.grid(x, common.HERE / "results" / "emoji.png", columns=len(PROMPTS))
    steps = make.info["config"]["steps"]
    text = [
        "# Emoji from captions", "", f"{common.measured_by('emoji')}.",
        f"JiT on 64x64 pixels, patches of 8, {steps} steps of batch {make.info['config']['batch_size']}, no autoencoder, text encoder learned along;",
        f"25 Heun steps. Top-1: how often the judge finds the right one of {COUNT.value} captions; guessing scores {100 / COUNT.value:.1f} %.", "",
        common.table("emoji", ["images", "guidance", "top-1 %"], rows), "",
        f"Columns: {', '.join(PROMPTS)} (guidance {make.info['config']['sample']['guidance']['scale']}).", "", "![](emoji.png)",
    ]  # fmt: skip
    common.page("emoji", "\n".join(text))
    return 0
