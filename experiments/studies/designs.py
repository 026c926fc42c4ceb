"""Choices of design on digits, each at equal steps and without guidance unless said: does the published direction show?

    python -m experiments.study designs          (finished runs are kept, so it goes on where it was stopped)
"""

import functools
import pathlib

from experiments.studies import common
from flowjax.train import runtime

STEPS = 500
LAW = {"name": "logit_normal", "stratified": True}


def pixels(patch: int, prediction: str):
    """A narrow JiT, so that large patches have more numbers than it is wide; the loss is the velocity's in both cases."""
    model = {"name": "jit", "patch": patch, "width": 32, "depth": 4, "heads": 4, "num_classes": 10, "class_tokens": 4, "context_from": 2, "scan": False}
    return {"model": model, "prediction": prediction, "objective": {"time": LAW, "weight": {"name": "velocity", "floor": 0.05}}}


def resolution(size: int, shift: float):
    """Digits at size x size in 16 tokens, times shifted."""
    return {"data": {"resize": 0 if size == 8 else size}, "model": {"patch": size // 4}, "objective": {"time": {**LAW, "shift": shift}}}


# title -> (what the papers found, {variant: changes of configs/digits.py})
SECTIONS = {
    "How the condition enters": (
        "DiT (2212.09748): adaLN-zero is better than cross-attention, which is better than in-context.",
        {"adaln_zero": {}} | {name: {"model": {"conditioning": name}} for name in ("adaln", "cross_attention", "in_context")},
    ),
    "Patch size": (
        "DiT (2212.09748): smaller patches, more tokens, better samples.",
        {f"{patch} x {patch}, {(8 // patch) ** 2} tokens": {} if patch == 2 else {"model": {"patch": patch}} for patch in (1, 2, 4)},
    ),
    "Image or velocity, by the numbers in a patch (network 32 wide)": (
        "JiT (2511.13720): the two agree while a patch has fewer numbers than the network is wide; beyond, velocity breaks down.",
        {f"patch {p}: {p * p} numbers, {name}": pixels(p, name) for p in (2, 4, 8) for name in ("x", "velocity")},
    ),
    "Time shift, by resolution": (
        "SD3 (2403.03206): more pixels of the same image want times nearer to the noise.",
        {f"{size} x {size}, shift {shift}": resolution(size, shift) for size in (8, 16) for shift in (0.5, 1.0, 2.0)},
    ),
    "Representation alignment": (
        "REPA (2410.06940): the same distance after fewer steps. Here the encoder is an in-repo MAE, aligned all the way.",
        {"none": {}, "REPA": "repa"},
    ),
}
DROPS, SCALES = (0.0, 0.1, 0.3), (None, 1.5, 2.0)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT = {"name": "bytes", "length": 8}


@functools.cache
def captioned():
    """A data section of the digits with a word for each."""
    from flowjax.data import records
    from flowjax.data.pipeline import arrays
    from flowjax.evals import image

    out = pathlib.Path(common.RUNS.value) / "designs" / "captioned"
    if not (out / "manifest.json").exists():
        parts = {split: arrays({"name": "digits"}, split) for split in ("train", "test")}
        rows = (
            (split, f"{split} {i}", {"image": picture, "label": label, "caption": WORDS[label]})
            for split, part in parts.items() for i, (picture, label) in enumerate(zip(image.quantise(part["x"]), part["cond"]["label"]))
        )  # fmt: skip
        records.write(out, rows, name="captioned_digits", num_classes=10, class_names=WORDS)
    return {"name": "array_record", "path": str(out), "text": TEXT}


def told(labels):
    """The condition that asks for these digits by their words."""
    from flowjax.data import text

    return {"tokens": text.build(TEXT)([WORDS[label] for label in labels])}


def captions(rate: float):
    """Digits by their words, which a small text encoder learns to read along with a JiT; dropped with probability `rate`."""
    encoder = {"vocab": 257, "length": TEXT["length"], "width": 48, "depth": 1, "heads": 4}
    model = {"name": "jit", "patch": 2, "width": 48, "depth": 4, "heads": 4, "context_from": 2, "scan": False, "text_encoder": encoder}
    return {"data": captioned(), "model": model, "objective": {"label_drop": rate}}


def dropped(what: str, changes, seeds, **options):
    """Rows for every rate of DROPS, changes(rate) of the config, and every scale of guidance that makes sense with it."""
    rows = []
    for rate in DROPS:
        workdirs = [run(f"{what}_drop {rate}", s, changes(rate)) for s in seeds]
        for scale in SCALES if rate else SCALES[:1]:  # a network that never saw "no condition" cannot be guided
            results = [common.measure(w, seed=s, guidance=scale, **options) for s, w in zip(seeds, workdirs)]
            rows.append(row(f"dropped {100 * rate:.0f} %, guidance {scale or 1}", results))
    return common.table(f"designs_drop_{what}", ["variant", "FD ratio", "class agreement %"], rows)


def run(name: str, seed: int, changes):
    """A finished run of configs/digits.py with changes."""
    short = {"seed": seed, "steps": STEPS}
    if changes == "repa":
        encoder = common.train(f"designs/mae/{seed}", common.config("digits_mae", seed=seed))
        settings = common.config("digits_repa", roles={"encoder": {"checkpoint": str(encoder)}}, objective={"stop": STEPS}, **short)
    else:
        settings = common.config("digits", **short, **changes)
    settings["sample"]["every"] = 0
    slug = "".join(c if c.isalnum() or c in "._" else "-" for c in (name if changes else "as configs/digits"))
    return common.train(f"designs/{slug}/{seed}", settings)


def row(name, results):
    distances = [common.frechet(r)["ratio"] for r in results]
    return [name, common.spread(distances), common.spread([100 * r["agreement"]["agreement"] for r in results])]


def main():
    runtime.setup()
    seeds = range(common.SEEDS.value)
    text = [
        "# Designs", "",
        f"{common.measured_by('designs')}; {STEPS} steps of batch 128 on digits, 1,000 samples,",
        "Heun 25. FD ratio: Frechet distance of pixels to held-out digits, divided by that of the training digits.",
    ]  # fmt: skip
    for i, (title, (published, variants)) in enumerate(SECTIONS.items()):
        rows = []
        for name, changes in variants.items():
            workdirs = [run(name, s, changes) for s in seeds]
            rows.append(row(name, [common.measure(w, seed=s, guidance=None) for s, w in zip(seeds, workdirs)]))
        text += ["", f"## {title}", "", published, "", common.table(f"designs_{i}", [title.lower(), "FD ratio", "class agreement %"], rows)]
        common.page("designs", "\n".join(text))
    published = "CFG (2207.12598): 10 to 20 % are enough; more costs quality."
    of_labels = dropped("label", lambda rate: {} if rate == 0.1 else {"objective": {"label_drop": rate}}, seeds)
    text += ["", "## Labels dropped in training, and guidance", "", published, "", of_labels]
    common.page("designs", "\n".join(text))
    said = 'The digits are asked for by their words ("three"), which a text encoder learns to read along.'
    text += ["", "## Captions dropped in training, and guidance", "", said, "", dropped("caption", captions, seeds, asked=told)]
    common.page("designs", "\n".join(text))
    return 0
