"""DreamBooth, with and without prior preservation: does a new word mean the subject, and is the class still one?

    python -m experiments.study personal --data=data/emoji      (after, and with the runs of, python -m experiments.study emoji)

The subject is an emoji that pre-training held out, seen in five views (as it is, mirrored, turned, smaller) under a word that no caption has;
the class is what the captions call it besides. The judge is the image tower of the emoji study, trained on the training images: it has not
seen the subject either.
"""

import functools
import pathlib

import numpy as np

from experiments.studies import common, emoji
from flowjax.config import ConfigError
from flowjax.train import runtime

SUBJECT, WORD, CLASS = "dog face", "zwx", "face"
PRIOR, COUNT = 200, 64  # images of the class that are rehearsed, and that are measured
GUIDANCE = 2.0


def views(x: np.ndarray) -> np.ndarray:
    """Five uint8 views of one image (H, W, C), on white."""
    from PIL import Image

    picture = Image.fromarray(x)
    size, white = picture.size, (255,) * x.shape[-1]
    turned = [picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=white) for angle in (-12, 12)]
    small = Image.new(picture.mode, size, white)
    small.paste(picture.resize((size[0] * 3 // 4, size[1] * 3 // 4), Image.Resampling.LANCZOS), (size[0] // 8, size[1] // 5))
    return np.stack([np.asarray(p) for p in (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), *turned, small)])


@functools.cache
def subject() -> pathlib.Path:
    """The data set of the five views, each under WORD CLASS."""
    from flowjax.data import records
    from flowjax.data.pipeline import arrays
    from flowjax.evals import image

    out, section = pathlib.Path(common.RUNS.value).absolute() / "personal" / "subject", common.config("emoji_pixel", emoji.data())["data"]
    if any(SUBJECT in caption for caption in arrays(section, "train")["caption"]):
        raise ConfigError(f"--data: the subject, {SUBJECT!r}, is among the training captions of {emoji.data()}; prepare it as configs/emoji_pixel.py says")
    held_out = arrays(section, "test")
    chosen = [i for i, caption in enumerate(held_out["caption"]) if caption == SUBJECT]
    if not chosen:
        raise ConfigError(f"--data: the held-out split of {emoji.data()} has no {SUBJECT!r}; prepare it as configs/emoji_pixel.py says")
    seen = views(image.quantise(held_out["x"][chosen[:1]])[0])
    records.write(out, (("train", f"view {i}", {"image": v, "caption": f"{WORD} {CLASS}"}) for i, v in enumerate(seen)), name="subject", overwrite=True)
    return out


@functools.cache
def rehearsed(base: pathlib.Path) -> pathlib.Path:
    """What the network made of the class before."""
    out = pathlib.Path(common.RUNS.value).absolute() / "personal" / "class"
    if not out.exists():
        asked = f"--prompt={CLASS}", f"--count={PRIOR}", f"--guidance={GUIDANCE}", "--steps=25"
        common.binary("tools.make_images", f"--checkpoint={base.absolute()}", *asked, f"--out={out}")
    return out


def personal(base: pathlib.Path, prior: float, seed: int) -> pathlib.Path:
    """A finished run of configs/emoji_dreambooth.py."""
    settings = common.config("emoji_dreambooth", f"{emoji.data()},{subject()},{rehearsed(base)}", seed=seed, objective={"prior": prior})
    settings["roles"]["net"]["checkpoint"], settings["sample"]["every"] = str(base.absolute()), 0
    return common.train(f"personal/prior_{prior:g}/{seed}", settings)


@functools.cache
def own() -> np.ndarray:
    """The judge's unit features of the views (5, D)."""
    from flowjax.data.pipeline import arrays

    return np.asarray(emoji.judge().embed_images(arrays({"name": "array_record", "path": str(subject())})["x"]))


def alike() -> float:
    """How near the views are to one another: what samples of the subject could at most be asked for."""
    cosines = own() @ own().T
    return float((cosines - 2 * np.eye(len(cosines))).max(1).mean())


def looks(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """Cosines of the judge's features between samples and the views of the subject, and the diversity of the class."""
    import jax

    from flowjax.train import export

    tokenizer = export.tokenizer_of(workdir, export.info_of(workdir))
    embed = jax.jit(emoji.judge().embed_images)

    def of(prompt):
        tokens = tokenizer([prompt] * COUNT)
        return np.asarray(embed(np.clip(common.draw(workdir, {"tokens": tokens}, COUNT, guidance=GUIDANCE, seed=seed), -1, 1)))

    named, kind = of(f"{WORD} {CLASS}"), of(CLASS)
    apart = np.linalg.norm(kind[:, None] - kind[None], axis=-1)
    return {
        "subject": float((named @ own().T).max(1).mean()), "class": float((kind @ own().T).max(1).mean()),
        "diversity": float(apart.sum() / (COUNT * (COUNT - 1))),
    }  # fmt: skip


def subjects() -> str:
    """The table of DreamBooth, and its pictures."""
    from flowjax.train import export, pictures

    base, seeds = emoji.teacher(0), range(common.SEEDS.value)
    ways = {"the base": [base for _ in seeds]} | {
        name: [personal(base, prior, seed) for seed in seeds] for name, prior in (("without prior preservation", 0.0), ("with", 1.0))
    }
    rows, shown = [], []
    for name, runs in ways.items():
        found = [common.kept(run, {"personal": [SUBJECT, seed, COUNT, GUIDANCE]}, functools.partial(looks, run, seed)) for seed, run in zip(seeds, runs)]
        rows.append([name, *(common.spread([f[k] for f in found]) for k in ("subject", "class", "diversity"))])
        print(rows[-1], flush=True)
        tokenizer = export.tokenizer_of(runs[0], export.info_of(runs[0]))
        for prompt in (f"{WORD} {CLASS}", CLASS):
            shown.append(common.draw(runs[0], {"tokens": tokenizer([prompt] * 8)}, 8, guidance=GUIDANCE))
    pictures.grid(np.concatenate(shown), common.HERE / "results" / "personal.png", columns=8)
    head = ["", f'"{WORD} {CLASS}": cosine to the subject', f'"{CLASS}": cosine to the subject', f'"{CLASS}": diversity']
    return common.table("personal_subject", head, rows)


def main():
    runtime.setup()
    text = [
        "# Personal networks", "", f"{common.measured_by('personal')}, of the fine-tuning: all begin with one network.", "",
        f'configs/emoji_dreambooth.py: five views of "{SUBJECT}", which pre-training held out, under "{WORD} {CLASS}". {COUNT} samples of each prompt,',
        f"guidance {GUIDANCE:g}. Cosine: to the nearest view, features of the emoji study's image tower. Diversity: mean distance of unit features",
        f'between samples of "{CLASS}". DreamBooth (2208.12242) finds that without prior preservation the class becomes the subject.', "",
        subjects(), "", f"The views among themselves, each to the nearest other: {alike():.4g}.", "",
        f'Rows: the base, without, with prior preservation; of each "{WORD} {CLASS}", then "{CLASS}".', "", "![](personal.png)",
    ]  # fmt: skip
    common.page("personal", "\n".join(text))
    return 0
