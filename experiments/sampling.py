"""Flags shared by the binaries that sample, and what they select. What is not given comes from the run's config."""

import pathlib

import numpy as np
from absl import flags

from experiments.shell import section
from flowjax.config import ConfigError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "An export, or the workdir of a run.")
WEIGHTS = flags.DEFINE_string("weights", "ema", 'For a workdir: the name of an average, or "params".')
COUNT = flags.DEFINE_integer("count", 0, "How many samples; 0: as in the run's config.", lower_bound=0)
LABELS = flags.DEFINE_list(
    "labels", [], "Classes to ask for, repeated in turn; default: all classes in turn. A network of classes and captions needs both."
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw, for a network of captions; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", "", "A file of prompts, one a line.")
NEGATIVE = flags.DEFINE_string("negative", "", "A prompt to be guided away from, in place of no prompt.")
SIZE = flags.DEFINE_string("size", "", "HEIGHTxWIDTH of the images in pixels, where it is not that of the training, or one number.")
INIT = flags.DEFINE_string("init", "", "An image to begin with (SDEdit) or to repaint a part of; scaled and cropped to the size that is made.")
STRENGTH = flags.DEFINE_float("strength", None, "With --init, the time to start at: near 0 keeps the image, 1 forgets it. Default: 0.6; 1 with --mask.")
MASK = flags.DEFINE_string("mask", "", "With --init, an image of the same size: what is white is painted anew, the rest stays.")
SEED = flags.DEFINE_integer("seed", -1, "Noise of sample i is a function of (seed, i); -1: as in the run's config.", lower_bound=-1)
STEPS = flags.DEFINE_integer("steps", 0, "Sampler steps; 0: as in the run's config.", lower_bound=0)
SAMPLER = flags.DEFINE_string("sampler", "", 'Name, or a section such as "{\'name\': \'ddim\', \'eta\': 1.0}".')
GRID = flags.DEFINE_string("grid", "", "Step grid: name or section.")
GUIDANCE = flags.DEFINE_string("guidance", "", 'Scale (classifier-free, or the input of a distilled network), "none", or a section.')
BATCH = flags.DEFINE_integer("batch", 0, "Samples per call, which does not change them; 0: as in the run's config.", lower_bound=0)
LORA = flags.DEFINE_multi_string(
    "lora", [], "PATH or PATH:WEIGHT of an adapter of this network: a workdir, an export, or a .safetensors file of diffusers or kohya. "
    "Several add up."
)
SAMPLING = ("labels", "prompt", "prompts", "negative", "size", "init", "strength", "mask", "steps", "sampler", "grid", "guidance", "count", "seed")
EACH = 4  # samples of each prompt


def load():
    """(role, params, info) of --checkpoint with the adapters of --lora."""
    from flowjax.train import export

    if not CHECKPOINT.value:
        raise ConfigError("--checkpoint is missing: an export, or the workdir of a run")
    role, params, info = export.load(CHECKPOINT.value, WEIGHTS.value)
    if LORA.value:
        params, info = export.adapted(role, params, info, [adapter(text, role, params) for text in LORA.value])
        role = export.role_of(info, "--checkpoint")  # a new word takes a larger table
    return role, params, info


def seed(info: dict) -> int:
    """--seed, or the one with which the run of `info` draws its pictures."""
    return info["config"]["sample"]["seed"] if SEED.value < 0 else SEED.value


def adapter(text: str, role, params) -> tuple:
    """(name, tree, Lora, info or None, weight) of one --lora, as export.adapted takes it."""
    from flowjax.interop import lora
    from flowjax.train import export

    name, _, weight = text.rpartition(":")
    try:
        weight = float(weight)
    except ValueError:
        name, weight = text, 1.0
    if not np.isfinite(weight):
        raise ConfigError(f"--lora={text}: the weight should be a number")
    if name.endswith(".safetensors"):
        return name, *lora.read(name, role.module, params), None, weight
    its, tree, info = export.stored(name, where="--lora")
    if its.lora is None:
        raise ConfigError(f"--lora={name} holds a whole network, no adapter")
    return name, tree, its.lora, info, weight


def guidance(text: str, info: dict):
    """A scale, "none", or a section. The scale of a network that takes one as an input is that input."""
    name = "embedded" if "guidance" in (info.get("conditions") or {}) else "cfg"
    try:
        return {"name": name, "scale": float(text)}
    except ValueError:
        return section(text, "guidance")


def options(info: dict) -> dict:
    """Sampling settings: the run's, overridden by flags."""
    from flowjax.train import generator

    given = {
        "steps": STEPS.value,
        "sampler": section(SAMPLER.value, "sampler"),
        "grid": section(GRID.value, "grid"),
        "guidance": guidance(GUIDANCE.value, info) if GUIDANCE.value else "",
    }
    given |= {"negative": NEGATIVE.value, "size": SIZE.value and size(SIZE.value)}
    return generator.chosen(info, {k: v for k, v in given.items() if v}) | edit(info)


def told(chosen: dict) -> dict:
    """`options` for the record: files by their names."""
    return {k: v for k, v in chosen.items() if k != "edit"} | {f.name: f.value for f in (INIT, STRENGTH, MASK, LORA) if f.value}


def size(text: str) -> tuple[int, int]:
    """(height, width) of "64x96" or "64"."""
    sides = text.split("x")
    if len(sides) > 2 or not all(n.isdigit() and int(n) for n in sides):
        raise ConfigError(f"--size={text} should be HEIGHTxWIDTH, or one number for both")
    return int(sides[0]), int(sides[-1])


def edit(info: dict) -> dict:
    """{"edit": flowjax.editing.Edit} of --init, --strength and --mask, or {}."""
    if not INIT.value:
        if MASK.value or STRENGTH.value is not None:
            raise ConfigError("--mask and --strength say what to do with the image of --init")
        return {}
    from flowjax import editing
    from flowjax.data import images

    if len(info["image_shape"]) != 3:
        raise ConfigError(f"--init: this network makes no images, but {tuple(info['image_shape'])}")
    height, width = size(SIZE.value) if SIZE.value else info["image_shape"][:2]
    channels = info["image_shape"][2]
    fit = lambda path, channels: images.fit(images.decode(path, path, channels), height, width)  # noqa: E731
    keep = None
    if MASK.value:
        keep = (fit(MASK.value, 1) < 128).astype(np.float32)
        if keep.all() or not keep.any():
            raise ConfigError(f"--mask={MASK.value} is {'black' if keep.all() else 'white'} all over: nothing to {'paint' if keep.all() else 'keep'}")
    picture = fit(INIT.value, channels).astype(np.float32) / 127.5 - 1
    usual = 1.0 if MASK.value else 0.6
    return {"edit": editing.Edit(picture, keep, usual if STRENGTH.value is None else STRENGTH.value)}


def prompts() -> list[str]:
    """What --prompt and --prompts ask for."""
    asked = list(PROMPT.value)
    if PROMPTS.value:
        try:
            lines = pathlib.Path(PROMPTS.value).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts={PROMPTS.value}: {error}") from None
        asked += [line.strip() for line in lines if line.strip()]
        if not asked:
            raise ConfigError(f"--prompts={PROMPTS.value} holds no prompts")
    return asked


def captions(source, info, count: int) -> tuple[dict, list[str]]:
    """(cond, the prompt of each sample) for `count` samples, all of one prompt together and about as many of each; count 0 is
    EACH of every prompt."""
    from flowjax.train import export

    tokenizer = export.tokenizer_of(source, info)
    asked = prompts()
    if count and count < len(asked):
        raise ConfigError(f"--count={count} is less than the {len(asked)} prompts")
    asked = asked or list(info["config"]["sample"].get("prompts") or ())
    if not asked:
        raise ConfigError("this network draws what a caption says: give --prompt or --prompts")
    count = count or EACH * len(asked)
    which = np.arange(count) * len(asked) // count
    return {"tokens": tokenizer(asked, "--prompt")[which]}, [asked[i] for i in which]


def captioned(info: dict) -> bool:
    """Whether the network draws what a caption says, as tokens or embedded."""
    return bool(info.get("text") or {"text", "pooled"} & {*(info.get("conditions") or ())})


def asked(source, info: dict, count: int) -> tuple[int, dict, list[str]]:
    """(count, cond, the prompt of each sample or []); count 0 is the run's own, or EACH of every prompt."""
    if captioned(info):
        classes = info.get("model", {}).get("num_classes")
        if bool(classes) != bool(LABELS.value):
            told = "is missing: this network is asked by a class and a prompt, both" if classes else ": this network is asked by --prompt alone"
            raise ConfigError(f"--labels{' ' * bool(classes)}{told}")
        cond, rows = captions(source, info, count)
        return len(rows), cond | (_classes(classes, len(rows)) if classes else {}), rows
    count = count or info["config"]["sample"]["count"]
    return count, labels(info, count), []


def labels(info: dict, count: int) -> dict:
    """cond of `count` samples of a network of classes, or of none."""
    if captioned(info):
        raise ConfigError("this network draws what a caption says; only classes, or nothing, can be asked for here")
    for flag in (PROMPT, PROMPTS, NEGATIVE):
        if flag.value:
            raise ConfigError(f"--{flag.name}: this network was not trained with captions")
    from flowjax import generate

    classes = info["num_classes"] if info["model"].get("num_classes") else 0
    if not LABELS.value:
        if not classes:
            return {}
        seen = generate.classes_of(info["config"], classes)
        return {"label": seen[generate.balanced_labels(count, len(seen))]}
    if not classes:
        raise ConfigError("--labels: this network has no classes")
    return _classes(classes, count)


def _classes(classes: int, count: int) -> dict:
    """{"label": those of --labels in turn (count,)}."""
    try:
        labels = np.array([int(v) for v in LABELS.value], np.int32)
    except ValueError:
        raise ConfigError(f"--labels={','.join(LABELS.value)} should be class numbers") from None
    if labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(f"--labels={','.join(LABELS.value)}: classes are 0 to {classes - 1}")
    return {"label": np.resize(labels, count)}
