"""One network through its whole life, a picture and the same figures after every stage.

    python -m experiments.study lifecycle [--runs=runs/studies --preference=dpo --shorten=0.1]
    python -m experiments.study lifecycle --life=emoji --data=data/emoji      (made as configs/emoji_pixel.py says; takes the towers of study emoji)

    digits   pre-training on 0 to 4 -> continued training on all, with replay -> fine-tuning on the most symmetric -> a judge ->
             {ReFL | Flow-GRPO | Diffusion-DPO} towards more ink -> DreamBooth as a LoRA -> a student of two steps
    emoji    pre-training on people -> continued training on things, with replay -> fine-tuning on the most symmetric -> a reward model,
             taught to like red -> {ReFL | Flow-GRPO | Diffusion-DPO} by it -> DreamBooth as a LoRA -> a student of two steps

Every stage is a config of configs/ with changes, begins with what the one before left, and is trained once and kept under --runs: the same command goes
on where it stopped. All three ways of preference are run; the one of --preference is carried on.
"""

import json

from absl import flags

from experiments.studies import common
from experiments.studies.living.base import PREFERENCE, SHORTEN
from experiments.studies.living.digits import Digits
from experiments.studies.living.emoji import Emoji
from flowjax.train import runtime

LIVES = {"digits": Digits, "emoji": Emoji}
LIFE = flags.DEFINE_enum("life", "digits", list(LIVES), "On what.")


def main():
    runtime.setup()
    life = LIVES[LIFE.value]()
    rows, shown = [], []
    for stage, workdir, how in list(life.stages()):  # the first are measured by a judge that is trained later
        card = json.loads((workdir / "card.json").read_text())
        found = life.figures(workdir, how)
        rows.append([stage, card["config"]["steps"], card["parameters"]["net"].split()[0], *(f"{found[k]:.4g}" for k in life.columns)])
        name = f"{life.name}_{len(rows)}"
        life.picture(life.result(name), workdir, how)
        shown += ["", f"{stage}:", "", f"![{stage}]({name}.png)"]
        print(rows[-1], flush=True)
    text = [
        f"# The life of a network, on {LIFE.value}", "",
        f"`python -m experiments.study lifecycle --life={LIFE.value}{common.of_data()} --preference={PREFERENCE.value} --shorten={SHORTEN.value:g}`: one seed,",
        *life.about, "Every stage begins with the weights of the one before; the three ways of preference all with the fine-tuned.", "",
        common.table(life.result(life.name), ["stage", "steps", "trained parameters", *life.columns.values()], rows), *shown,
    ]  # fmt: skip
    common.page(life.result(life.name), "\n".join(text))
    return 0
