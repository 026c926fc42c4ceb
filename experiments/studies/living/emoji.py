"""A life on 32x32 emoji, asked for by caption: a reward model stands between the preferences and the network."""

import functools
import pathlib

import numpy as np

from experiments.studies import common, emoji, personal
from experiments.studies.living.base import PREFERENCE, Life, begins
from flowjax.config import ConfigError

SIZE, DOMAIN = 32, "skin tone"  # of the images; what the captions of the first domain say
REWARD, GUIDANCE, PROMPTS = "red", 2.0, 50
SUBJECT, CLASS = f"{personal.WORD} {personal.CLASS}", personal.CLASS
USUAL, FEW = {"guidance": GUIDANCE}, {"steps": 2, "sampler": "renoise"}
SHOWN = (
    "woman with dark skin tone", "man with light skin tone", "raised hand with medium skin tone", "heavy black heart", "rainbow", "grinning face",
    SUBJECT, CLASS,
)  # fmt: skip


class Emoji(Life):
    name, count = "lifecycle_emoji", PROMPTS
    columns = {
        "old": "top-1 people %", "new": "top-1 things %", "red": "red", "model": "reward model", "symmetry": "symmetry", "subject": "to the subject",
        "class": f'"{CLASS}" to the subject',
    }  # fmt: skip
    about = (
        f"{PROMPTS} training captions of each domain, Heun with 25",
        f'steps and guidance {GUIDANCE:g}, but for the student. People are the captions with "{DOMAIN}", things the others. Top-1: how often two',
        "towers, those of the emoji study, find the right one of the domain's captions; red: mean of the red channel less that of the others, what",
        "the preferences are made by; reward model: what it says, whose zero and unit are its own. To the subject: cosine of the towers' features",
        f'of 32 samples of "{SUBJECT}", or "{CLASS}", to the nearest of five views of an emoji that no stage before DreamBooth has seen.',
    )

    @functools.cached_property
    def plain(self) -> dict:
        """The config of pre-training."""
        return common.config("emoji_pixel", f"{SIZE}:{emoji.data()}")

    @property
    def text(self) -> dict:
        """The tokenizer's section, wherever the images of a stage lie."""
        return self.plain["data"]["text"]

    @functools.cached_property
    def domains(self) -> dict[str, np.ndarray]:
        """Rows of the training split, in its order."""
        from flowjax.data.pipeline import arrays

        captions = arrays({"name": "array_record", "path": emoji.data(), "resize": SIZE, "text": self.text})["caption"]
        people = np.array([DOMAIN in caption for caption in captions])
        if min(people.sum(), (~people).sum()) < PROMPTS:
            raise ConfigError(f"--data: {emoji.data()} should have {PROMPTS} captions at least with {DOMAIN!r}, and without; it has {people.sum()} with")
        return {"old": np.flatnonzero(people), "new": np.flatnonzero(~people)}

    def part(self, name: str, domain: str) -> dict:
        """The data section of a domain."""
        rows = self.file(f"{domain}.txt")
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("\n".join(map(str, self.domains[domain])))
        out = self.made(name, "tools.curate", f"--data={{'name': 'array_record', 'path': '{emoji.data()}'}}", f"--rows={rows}")
        return self.images(out)

    def images(self, path) -> dict:
        return {"name": "array_record", "path": str(path), "resize": SIZE, "text": self.text}

    @functools.cache
    def asked(self, domain: str):
        """(images, tokens, captions) of different captions of a domain."""
        from flowjax.data.pipeline import arrays

        whole, rows = arrays(self.images(emoji.data())), self.domains[domain]
        part = {"x": whole["x"][rows], "cond": {"tokens": whole["cond"]["tokens"][rows]}, "caption": [whole["caption"][i] for i in rows]}
        return emoji.distinct(part, PROMPTS, 0)

    def stages(self):
        path, own = emoji.data(), f"{SIZE}:{emoji.data()}"
        stage = lambda name, steps, **changes: self.trained(name, "emoji_pixel", steps, own, **changes)  # noqa: E731
        whole, law = self.images(path), self.plain["objective"]
        short = lambda decay: {"ema": {"name": "constant", "decay": decay}}  # noqa: E731
        old, new = self.part("people", "old"), self.part("things", "new")
        base = stage("pretrained", 900, data=old, optimizer=adamw("cosine", 1e-3, 50))
        yield "pre-training on people", base, USUAL
        mixed = {"name": "mixture", "parts": (new, old), "weights": (0.7, 0.3)}
        layers = {"rules": ({"match": r"^block_\d+/", "layer_decay": 0.8},)}
        more = stage("continued", 600, data=mixed, roles={"net": begins(base)}, optimizer=adamw("cosine", 1e-3, 50) | layers)
        yield "continued training on things, 30 % replay", more, USUAL
        images = f"--data={{'name': 'array_record', 'path': '{path}'}}"
        curated = self.made("curated", "tools.curate", images, "--reward=symmetry", "--best=0.2")
        chosen = {"name": "mixture", "parts": (self.images(curated), whole), "weights": (0.8, 0.2)}
        tuned = stage("sft", 200, data=chosen, roles={"net": begins(more)}, ema=short(0.98), optimizer=adamw("constant", 1e-4, 20))
        yield "fine-tuning on the most symmetric fifth", tuned, USUAL

        judge, pairs = self.judge(tuned)
        asked = {"data": whole, "ema": short(0.9), "optimizer": adamw("constant", 1e-4, 10)}
        refl = {
            "name": "reward_feedback", "reward": {"model": 1.0, REWARD: 0.0}, "steps": 10, "through": 1, "late": 4, "strength": 0.1, "pretrain": 1.0,
            "time": law["time"], "weight": law["weight"],
        }  # fmt: skip
        ways = {"refl": stage("refl", 50, objective=refl, roles={"net": begins(tuned), "reward": begins(judge)}, **asked)}
        yield "ReFL by the reward model", ways["refl"], USUAL
        grpo = {"name": "flow_grpo", "reward": {"model": 1.0, REWARD: 0.0}, "group": 16, "steps": 8, "clip": 0.1, "beta": 0.1}
        roles = {"net": begins(tuned) | {"updates": 2}, "reference": begins(tuned), "reward": begins(judge)}
        ways["grpo"] = stage("grpo", 30, objective=grpo, roles=roles, **asked)
        yield "Flow-GRPO by the reward model", ways["grpo"], USUAL
        dpo = {"name": "diffusion_dpo", "beta": 200.0, "form": "velocity", "time": law["time"]}
        roles, paired = {"net": begins(tuned), "reference": begins(tuned)}, {"name": "preferences", "path": str(pairs), "text": self.text}
        ways["dpo"] = stage("dpo", 120, objective=dpo, data=paired, roles=roles, ema=short(0.98), optimizer=adamw("constant", 5e-5, 20))
        yield "Diffusion-DPO on its preferences", ways["dpo"], USUAL

        way, chosen = PREFERENCE.value, ways[PREFERENCE.value]
        prior = f"--checkpoint={chosen.absolute()}", f"--prompt={CLASS}", f"--count={self.few(200, 20)}", f"--guidance={GUIDANCE}", "--steps=25"
        prior, subject = self.made(f"prior_{way}", "tools.make_images", *prior), personal.subject()
        both = {"name": "mixture", "parts": (self.images(subject), self.images(prior)), "weights": (1.0, 1.0), "prior": (1,)}
        named = self.trained(f"dreambooth_{way}", "emoji_dreambooth", 150, f"{path},{subject},{prior}", data=both, roles={"net": begins(chosen)})
        yield f"DreamBooth of an emoji held out, LoRA on {way}", named, USUAL
        cd = {
            "name": "consistency_distillation", "steps": 16, "solver": "heun", "metric": "pseudo_huber", "huber": 0.03,
            "guidance": {"name": "cfg", "scale": GUIDANCE},
        }  # fmt: skip
        averages = {"ema": {"name": "warmup", "decay": 0.99}, "target": {"name": "constant", "decay": 0.95}}
        taught = {"name": "mixture", "parts": (whole, self.images(subject)), "weights": (0.9, 0.1)}  # else it never hears the new word
        student = stage(
            f"student_{way}", 120, objective=cd, data=taught, ema=averages, optimizer=adamw("cosine", 5e-4, 20),
            roles={"net": begins(named), "teacher": begins(named)}, sample={"guidance": "none", **FEW},
        )  # fmt: skip
        yield f"student of it in two steps (guidance {GUIDANCE:g} baked in)", student, FEW

    def judge(self, tuned: pathlib.Path):
        """(reward model, pairs of the fine-tuned network's samples that it learned from), on two towers of its own."""
        prompts = self.file("prompts.txt")
        prompts.write_text("\n".join(caption for domain in self.domains for caption in self.asked(domain)[2]))
        how = f"--prompts={prompts}", f"--pairs={self.few(400, 2 * PROMPTS)}", "--candidates=2", f"--reward={REWARD}", "--steps=10", "--seed=1"
        pairs = self.made("pairs", "tools.prefer", f"--checkpoint={tuned.absolute()}", *how, f"--guidance={GUIDANCE}", "--holdout=0.1")
        towers = common.config("emoji_clip", emoji.data())["model"]
        towers["image"] = {**towers["image"], "grid": SIZE // towers["image"]["patch"]}
        start = self.trained("towers", "emoji_clip", 300, emoji.data(), seed=3000, data=self.images(emoji.data()), model=towers)
        return self.trained("judge", "emoji_reward", 200, f"{pairs},{emoji.data()}", model={"backbone": towers}, roles={"net": begins(start)}), pairs

    def measured(self, workdir: pathlib.Path, how: dict) -> dict:
        from flowjax.evals import image, rewards

        found, stored, prompts = {}, [], []
        for domain in self.domains:
            _, tokens, captions = self.asked(domain)
            x = common.draw(workdir, {"tokens": tokens}, len(tokens), **how)
            found[domain] = emoji.score(large(x), tokens)
            stored.append(image.quantise(x, sampled=True))
            prompts += captions
        stored, judge = np.concatenate(stored), rewards.judge(str(self.file("judge")))
        found |= {name: float(rewards.reward(name, stored, None).mean()) for name in (REWARD, "symmetry")}
        found["model"] = float(rewards.reward("model", stored, None, judge, prompts).mean())
        views = personal.own()
        for name, prompt in (("subject", SUBJECT), ("class", CLASS)):
            x = common.draw(workdir, {"tokens": self.tokens(workdir, [prompt] * 32)}, 32, **how)
            found[name] = float((np.asarray(emoji.judge().embed_images(large(x))) @ views.T).max(1).mean())
        return found

    def tokens(self, workdir, prompts: list[str]) -> np.ndarray:
        from flowjax.train import export

        return export.tokenizer_of(workdir, export.info_of(workdir))(prompts)

    def picture(self, name, workdir, how):
        """A column a prompt."""
        from flowjax.train import pictures

        x = common.draw(workdir, {"tokens": self.tokens(workdir, [*SHOWN] * 2)}, 2 * len(SHOWN), **how)
        pictures.grid(x, common.HERE / "results" / f"{name}.png", columns=len(SHOWN))


def adamw(schedule: str, rate: float, warmup: int) -> dict:
    return {"name": "adamw", "clip": 1.0, "schedule": {"name": schedule, "rate": rate, "warmup": warmup}}


def large(x: np.ndarray) -> np.ndarray:
    """Samples as large as the towers look at, clipped."""
    import jax

    size = 2 * SIZE
    return np.asarray(jax.image.resize(np.clip(x, -1, 1), (len(x), size, size, x.shape[-1]), "cubic").clip(-1, 1))
