"""A life on scikit-learn's digits, asked for by class."""

import pathlib

import numpy as np
from absl import flags

from configs.digits_continue import NEW, OLD
from experiments.studies import common
from experiments.studies.living.base import PREFERENCE, Life, begins

COUNT = flags.DEFINE_integer("count", 500, "Samples that each stage of the digits is measured on.", lower_bound=20)
REWARD = {"ink": 1.0, "agreement": 0.02, "symmetry": 0.0}  # agreement: asked of the judge
SUBJECT = {"name": "digits", "classes": (3,), "limit": 5}  # of configs/digits_dreambooth.py
FEW = {"steps": 2, "sampler": "renoise"}


class Digits(Life):
    name = "lifecycle"
    columns = {
        "old": "agreement 0-4 %", "new": "agreement 5-9 %", "frechet": "FD-pixels", "ink": "ink", "symmetry": "symmetry", "subject": "3 to the subject",
    }  # fmt: skip

    @property
    def count(self):
        return COUNT.value

    @property
    def about(self):
        return (
            f"{self.count} samples a stage,",
            "Heun with 25 steps and no guidance, but for the student. Agreement: a scikit-learn SVM finds the asked class. FD-pixels: Frechet",
            "distance of pixels to the 297 held-out digits. Distance to the subject: root mean square difference of pixels of the asked threes from",
            "the nearest of the five.",
        )

    def stages(self):
        base = self.trained("pretrained", "digits", 1200, data={"classes": OLD})
        yield "pre-training on 0 to 4", base, {}
        more = self.trained("continued", "digits_continue", 800, roles={"net": begins(base)})
        yield "continued training on all, 30 % replay", more, {}
        curated = self.made("curated", "tools.curate", "--data=digits", "--reward=symmetry", "--best=0.2", "--each_class")
        tuned = self.trained("sft", "digits_sft", 200, str(curated), roles={"net": begins(more)})
        yield "fine-tuning on the most symmetric fifth", tuned, {}

        judge = self.trained("judge", "digits_classifier", 300, "clean")
        reward = {"reward": REWARD}
        ways = {"refl": self.trained("refl", "digits_refl", 60, objective=reward, roles={"net": begins(tuned), "reward": begins(judge)})}
        yield "ReFL towards more ink", ways["refl"], {}
        roles = {"net": begins(tuned), "reference": begins(tuned), "reward": begins(judge)}
        ways["grpo"] = self.trained("grpo", "digits_grpo", 60, objective=reward, roles=roles)
        yield "Flow-GRPO towards more ink", ways["grpo"], {}
        pairs = f"--pairs={self.few(500, 40)}", "--reward=ink", "--steps=10", "--guidance=none", "--seed=1"
        pairs = self.made("pairs", "tools.prefer", f"--checkpoint={tuned.absolute()}", *pairs)
        roles = {"net": begins(tuned), "reference": begins(tuned)}
        ways["dpo"] = self.trained("dpo", "digits_dpo", 200, data={"path": str(pairs)}, roles=roles)
        yield "Diffusion-DPO towards more ink", ways["dpo"], {}

        way, chosen = PREFERENCE.value, ways[PREFERENCE.value]
        prior = f"--checkpoint={chosen.absolute()}", "--labels=3", f"--count={self.few(200, 20)}", "--guidance=none", "--steps=25"
        prior = self.made(f"prior_{way}", "tools.make_images", *prior)
        personal = self.trained(f"dreambooth_{way}", "digits_dreambooth", 200, str(prior), roles={"net": begins(chosen)})
        yield f"DreamBooth of five digits, LoRA on {way}", personal, {}
        student = self.trained(f"student_{way}", "digits_cd", 300, roles={"net": begins(personal), "teacher": begins(personal)})
        yield "student of it in two steps (guidance 2 baked in)", student, FEW

    def measured(self, workdir: pathlib.Path, how: dict) -> dict:
        from flowjax.data.pipeline import arrays
        from flowjax.evals import agreement, image, protocol, rewards
        from flowjax.evals.evaluate import evaluate

        real = {k: {"x": p["x"], "label": p["cond"]["label"]} for k, p in ((k, arrays("digits", k)) for k in ("train", "test"))}
        labels = protocol.labels(self.count, 10, "balanced", 0)
        x = common.samples(workdir, labels, **how)
        frechet = common.frechet(evaluate(x, labels, real, {"metrics": ("frechet",), "features": ("pixels",), "seed": 0, "sampled": True}))
        stored = image.quantise(x, sampled=True)
        seen = agreement.judge("svm", image.quantise(real["train"]["x"]), real["train"]["label"])(stored) == labels
        subject = arrays(SUBJECT)["x"].reshape(5, 1, -1)
        near = np.square(subject - np.clip(x[labels == 3], -1, 1).reshape(1, -1, 64)).mean(-1).min(0)
        group = lambda classes: 100 * float(seen[np.isin(labels, classes)].mean())  # noqa: E731
        return {
            "old": group(OLD), "new": group(NEW), "frechet": frechet["distance"], "subject": float(np.sqrt(near).mean()),
            **{name: float(rewards.reward(name, stored, labels).mean()) for name in ("ink", "symmetry")},
        }  # fmt: skip

    def picture(self, name, workdir, how):
        common.picture(name, workdir, rows=2, **how)
