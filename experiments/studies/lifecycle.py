"""One network through its whole life on the digits, a picture and the same figures after every stage.

    python -m experiments.study lifecycle [--runs=runs/studies --preference=dpo --shorten=0.1]

    pre-training on 0 to 4 -> continued training on all, with replay -> fine-tuning on the most symmetric -> a judge ->
    {ReFL | Flow-GRPO | Diffusion-DPO} towards more ink -> DreamBooth as a LoRA -> a student of two steps

Every stage is a config of configs/, begins with what the one before left, and is trained once and kept under --runs: the same command goes
on where it stopped. All three ways of preference are run; the one of --preference is carried on.
"""

import json
import pathlib

import numpy as np
from absl import flags

from configs.digits_continue import NEW, OLD
from experiments.studies import common
from flowjax.train import runtime

SHORTEN = flags.DEFINE_float(
    "shorten", 1.0, "All stages have this share of their steps: for a look at the chain, whose runs and page go to a folder of its own in --runs.",
    lower_bound=0.0,
)  # fmt: skip
COUNT = flags.DEFINE_integer("count", 500, "Samples that each stage is measured on.", lower_bound=20)
PREFERENCE = flags.DEFINE_enum("preference", "dpo", ["refl", "grpo", "dpo"], "The way of preference that the later stages go on from.")
REWARD = {"ink": 1.0, "agreement": 0.02, "symmetry": 0.0}  # agreement: asked of the judge
SUBJECT = {"name": "digits", "classes": (3,), "limit": 5}  # of configs/digits_dreambooth.py
FEW = {"steps": 2, "sampler": "renoise"}


def folder() -> str:
    """Of the runs, in --runs: those of another --shorten are others, which a longer run must not go on with."""
    return "lifecycle" if SHORTEN.value == 1 else f"lifecycle_{SHORTEN.value:g}"


def result(name: str) -> str:
    """Where a result lies: an absolute path takes the place of the studies' own folder."""
    return name if SHORTEN.value == 1 else str((pathlib.Path(common.RUNS.value) / folder() / name).absolute())


def trained(stage: str, config: str, steps: int, arg: str = "", **changes) -> pathlib.Path:
    """The workdir of a stage: configs/<config>.py for `steps` steps; of roles only what is given changes."""
    settings = common.config(config, arg, **{k: v for k, v in changes.items() if k != "roles"})
    for role, section in changes.get("roles", {}).items():
        settings["roles"][role] = {**settings["roles"].get(role, {}), **section}
    settings["steps"] = max(2, round(steps * SHORTEN.value))
    settings["sample"] = {**settings["sample"], "every": 0}
    settings["validation"] = {**settings["validation"], "every": 0}
    return common.train(f"{folder()}/{stage}", settings)


def made(name: str, module: str, *arguments: str) -> pathlib.Path:
    """A data set that a tool makes once."""
    out = pathlib.Path(common.RUNS.value).absolute() / folder() / name
    if not out.exists():
        common.binary(module, *arguments, f"--out={out}")
    return out


def stages():
    """(name, workdir, how to sample it) of every stage, in order; a judge is none of them."""
    few = 1.0 if SHORTEN.value >= 1 else max(SHORTEN.value, 0.05)  # share of the examples that are made on the way
    from_ = lambda workdir: {"checkpoint": str(workdir.absolute())}  # noqa: E731
    base = trained("pretrained", "digits", 1200, data={"classes": OLD})
    yield "pre-training on 0 to 4", base, {}
    more = trained("continued", "digits_continue", 800, roles={"net": from_(base)})
    yield "continued training on all, 30 % replay", more, {}
    curated = made("curated", "tools.curate", "--data=digits", "--reward=symmetry", "--best=0.2", "--each_class")
    tuned = trained("sft", "digits_sft", 200, str(curated), roles={"net": from_(more)})
    yield "fine-tuning on the most symmetric fifth", tuned, {}

    judge = trained("judge", "digits_classifier", 300, "clean")
    reward = {"reward": REWARD}
    ways = {"refl": trained("refl", "digits_refl", 60, objective=reward, roles={"net": from_(tuned), "reward": from_(judge)})}
    yield "ReFL towards more ink", ways["refl"], {}
    roles = {"net": from_(tuned), "reference": from_(tuned), "reward": from_(judge)}
    ways["grpo"] = trained("grpo", "digits_grpo", 60, objective=reward, roles=roles)
    yield "Flow-GRPO towards more ink", ways["grpo"], {}
    pairs = f"--pairs={max(40, round(500 * few))}", "--reward=ink", "--steps=10", "--guidance=none", "--seed=1"
    pairs = made("pairs", "tools.prefer", f"--checkpoint={tuned.absolute()}", *pairs)
    roles = {"net": from_(tuned), "reference": from_(tuned)}
    ways["dpo"] = trained("dpo", "digits_dpo", 200, data={"path": str(pairs)}, roles=roles)
    yield "Diffusion-DPO towards more ink", ways["dpo"], {}

    chosen = ways[PREFERENCE.value]
    prior = f"--checkpoint={chosen.absolute()}", "--labels=3", f"--count={max(20, round(200 * few))}", "--guidance=none", "--steps=25"
    prior = made(f"prior_{PREFERENCE.value}", "tools.make_images", *prior)
    personal = trained(f"dreambooth_{PREFERENCE.value}", "digits_dreambooth", 200, str(prior), roles={"net": from_(chosen)})
    yield f"DreamBooth of five digits, LoRA on {PREFERENCE.value}", personal, {}
    student = trained(f"student_{PREFERENCE.value}", "digits_cd", 300, roles={"net": from_(personal), "teacher": from_(personal)})
    yield "student of it in two steps (guidance 2 baked in)", student, FEW


def figures(workdir: pathlib.Path, how: dict) -> dict:
    """What is measured after a stage, stored beside it and read back the next time."""
    from flowjax.data.pipeline import arrays
    from flowjax.evals import agreement, image, protocol, rewards
    from flowjax.evals.evaluate import evaluate

    key = {"count": COUNT.value, "how": how}
    file = workdir / "study" / f"lifecycle-{protocol.digest(key)}.json"
    if file.exists():
        return json.loads(file.read_text())
    real = {k: {"x": p["x"], "label": p["cond"]["label"]} for k, p in ((k, arrays("digits", k)) for k in ("train", "test"))}
    labels = protocol.labels(COUNT.value, 10, "balanced", 0)
    x = common.samples(workdir, labels, **how)
    frechet = common.frechet(evaluate(x, labels, real, {"metrics": ("frechet",), "features": ("pixels",), "seed": 0, "sampled": True}))
    stored = image.quantise(x, sampled=True)
    seen = agreement.judge("svm", image.quantise(real["train"]["x"]), real["train"]["label"])(stored) == labels
    subject = arrays(SUBJECT)["x"].reshape(5, 1, -1)
    near = np.square(subject - np.clip(x[labels == 3], -1, 1).reshape(1, -1, 64)).mean(-1).min(0)
    group = lambda classes: 100 * float(seen[np.isin(labels, classes)].mean())  # noqa: E731
    found = {
        "old": group(OLD), "new": group(NEW), "frechet": frechet["distance"], "subject": float(np.sqrt(near).mean()),
        **{name: float(rewards.reward(name, stored, labels).mean()) for name in ("ink", "symmetry")},
    }  # fmt: skip
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    return found


def main():
    runtime.setup()
    head = ["stage", "steps", "trained parameters", "agreement 0-4 %", "agreement 5-9 %", "FD-pixels", "ink", "symmetry", "3 to the subject"]
    rows, shown = [], []
    for stage, workdir, how in stages():
        card = json.loads((workdir / "card.json").read_text())
        found = figures(workdir, how)
        numbers = [f"{found[k]:.4g}" for k in ("old", "new", "frechet", "ink", "symmetry", "subject")]
        rows.append([stage, card["config"]["steps"], card["parameters"]["net"].split()[0], *numbers])
        name = f"lifecycle_{len(rows)}"
        common.picture(result(name), workdir, rows=2, **how)
        shown += ["", f"{stage}:", "", f"![{stage}]({name}.png)"]
        print(rows[-1], flush=True)
    text = [
        "# The life of a network", "",
        f"`python -m experiments.study lifecycle --preference={PREFERENCE.value} --shorten={SHORTEN.value:g}`: one seed,",
        f"{COUNT.value} samples a stage,",
        "Heun with 25 steps and no guidance, but for the student. Agreement: a scikit-learn SVM finds the asked class. FD-pixels: Frechet",
        "distance of pixels to the 297 held-out digits. Distance to the subject: root mean square difference of pixels of the asked threes from",
        "the nearest of the five. Every stage begins with the weights of the one before; the three ways of preference all with the fine-tuned.", "",
        common.table(result("lifecycle"), head, rows), *shown,
    ]  # fmt: skip
    common.page(result("lifecycle"), "\n".join(text))
    return 0
