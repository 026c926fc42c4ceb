"""Do short prompts gain from being rewritten? Text to image on emoji, judged by towers of another seed.

    python -m experiments.study enhance --data=data/emoji --seeds=1      (after, and with the runs of, python -m experiments.study emoji)

Of held-out captions only the last word of the subject is asked for. Five ways from there: as it is; rewritten by template; by the language
model of configs/emoji_enhance.py; with the detail of another caption, which should not help; and the whole caption, which no rewriter can
beat. The same noise for all. What was asked for is what alignment is measured against; the caption tells how much of it came back.
"""

import itertools
import pathlib

import numpy as np

from experiments.studies import common, emoji
from flowjax.train import runtime

EACH = 4  # images of a prompt
GUIDANCE = 3.0


def short_and_long(captions, count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """(prompts, captions) of `count` captions that say more than their shortest prompt, a prompt once."""
    from flowjax.enhance import shortened

    found = {}
    for caption in np.random.default_rng(seed).permutation(sorted({*captions})).tolist():
        short = shortened(caption)[-1]
        if short != caption:
            found.setdefault(short, caption)
    return [*found][:count], [*found.values()][:count]


def strangers(shorts, captions) -> list[str]:
    """Each prompt with the detail (or the other words) of the next caption that is of another subject."""
    from flowjax.enhance import CLAUSE

    made = []
    for i, short in enumerate(shorts):
        others = (captions[(i + k) % len(captions)] for k in range(1, len(captions)))
        detail = next((o.partition(CLAUSE)[2] for o in others if CLAUSE in o and short not in o.split()), "")
        made.append(f"{short}{CLAUSE}{detail}" if detail else short)
    return made


def pairwise(features: np.ndarray) -> float:
    """Mean distance between the images of a prompt, of unit features (prompts, EACH, D)."""
    pairs = itertools.combinations(range(features.shape[1]), 2)
    return float(np.mean([np.linalg.norm(features[:, a] - features[:, b], axis=-1) for a, b in pairs]))


def main():
    import jax
    from scipy.stats import binomtest

    runtime.setup()
    from flowjax import enhance
    from flowjax.data import text
    from flowjax.evals import retrieval
    from flowjax.train import export, generator

    data = emoji.data()
    judge = emoji.judge()
    pairs = pathlib.Path(common.RUNS.value).absolute() / "emoji_pairs"
    if not pairs.exists():
        common.binary("tools.make_caption_pairs", f"--path={pathlib.Path(data).absolute()}", f"--out={pairs}")
    writer = common.train("emoji_enhance", common.config("emoji_enhance", f"{data},{pairs}"))
    shorts, longs = short_and_long(text.captions(data, "test"), emoji.COUNT.value)
    embed = jax.jit(judge.embed_images)
    rows, example, signs = {}, [], {}
    for seed in range(common.SEEDS.value):
        run = common.train(f"emoji_pixel/{seed}", common.config("emoji_pixel", data, seed=seed))
        make = generator.load(run, settings={"guidance": {"name": "cfg", "scale": GUIDANCE}})
        tokenizer = export.tokenizer_of(run, make.info)
        fits = tokenizer.fits
        build = lambda section, fits=fits: enhance.build(section, lambda path: text.captions(path or data, "train"), fits)  # noqa: E731
        asked = {
            "as it is": shorts,
            "template": build({"name": "template", "seed": seed})(shorts),
            "language model": build({"name": "model", "checkpoint": str(writer), "seed": seed})(shorts),
            "a stranger's detail": [s if fits(s) else short for s, short in zip(strangers(shorts, longs), shorts)],
            "the whole caption": longs,
        }
        example = example or [f"- {a} -> {b} -> {c}" for a, b, c in zip(shorts[:8], asked["template"], asked["language model"])]
        plain = None
        for way, prompts in asked.items():
            x = make({"tokens": np.repeat(tokenizer(prompts), EACH, 0)}, EACH * len(prompts), seed)
            x = np.clip(x, -1, 1)
            of = lambda texts: retrieval.similarities(judge, x, tokenizer(texts))  # noqa: E731, B023
            own = np.repeat(np.arange(len(prompts)), EACH)
            short = of(shorts)[np.arange(len(x)), own].reshape(-1, EACH).mean(1)
            back = of(longs)
            plain = short if plain is None else plain
            wins, losses = int((short > plain).sum()), int((short < plain).sum())
            signs[way] = np.add(signs.get(way, (0, 0)), (wins, losses))
            features = np.concatenate([np.asarray(embed(x[i : i + 256])) for i in range(0, len(x), 256)])
            rows.setdefault(way, []).append([
                short.mean(), 100 * wins / max(1, wins + losses), back[np.arange(len(x)), own].mean(),
                100 * retrieval.retrieval(back, right=own[:, None] == np.arange(len(longs))),
                pairwise(features.reshape(-1, EACH, features.shape[-1])),
            ])  # fmt: skip
            print(way, rows[way][-1], flush=True)
    head = ["prompt", "cosine to what was asked", "better than as it is %", "cosine to the caption", "top-1 %", "diversity", "p of a gain (sign test)"]
    test = lambda wins, losses: binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0  # noqa: E731
    lines = [[way, *(common.spread(v) for v in zip(*found)), f"{test(*map(int, signs[way])):.2g}"] for way, found in rows.items()]
    page = [
        "# Short prompts, rewritten", "", f"{common.measured_by('enhance')},",
        f"{len(shorts)} prompts of one word, from held-out captions, {EACH} images each with the same noise, guidance {GUIDANCE:g}. Cosines and",
        "top-1 (the right one of as many captions) by two towers of another seed; diversity: mean distance of their unit features within a prompt.",
        "Prompts whose two cosines are equal count neither way; the sign test is over the prompts of all seeds, which share the judge and the",
        "prompts: of independent networks, not of independent words.", "", common.table("enhance", head, lines), "",
        "Prompt -> template -> language model:", "", *example,
    ]  # fmt: skip
    common.page("enhance", "\n".join(page))
    return 0
