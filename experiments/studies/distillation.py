"""Every road from many steps to one, on equal terms: one teacher, one network, one budget of computation.

    python -m experiments.study distillation --part=plane      four Gaussians, taught by their exact velocity; minutes
    python -m experiments.study distillation --part=digits     taught by the networks of experiments.study digits; hours

A budget is counted in steps of the teacher's own training: a method whose step costs twice as much takes half as many. What it takes
to make couplings is not in it, and is told beside.
"""

import functools
import json
import pathlib
import time

import numpy as np
from absl import flags

from experiments.studies import common
from flowjax.train import runtime

PART = flags.DEFINE_enum("part", "plane", ["plane", "digits"], "Which of the two.")
CHOSEN = flags.DEFINE_list("methods", [], "Methods to run, by a part of their names; none: all.")
BUDGET = flags.DEFINE_integer("budget", 0, "Steps of the teacher's training that each method's computation amounts to; 0: the part's own.", lower_bound=0)
STEPS = (1, 2, 4, 8)
UNIFORM = {"name": "uniform", "stratified": True}
ONE_STEP = {"name": "steps", "count": 1, "stratified": True}


def cost(settings: dict) -> float:
    """FLOP of one train step, on average where a player acts in every few steps only (all of one pace, if several)."""
    from flowjax.models import flops
    from flowjax.train.assembly import Run

    run = Run(settings)
    step = run.step(), run.target, run.frozen, run.batch()
    full, rest, pace = flops.count(*step), flops.count(*step, branch=min), max(run.every.values())
    return rest + (full - rest) / pace


class Part:
    """One data set, its teacher, and how students of it are trained and measured.

    name, base (a config), model (changes of its network), budget (steps of the teacher's training), rate (of students), guidance (of the
    teacher, a section or None), finest (its steps, for progressive distillation), couplings (how they are made).
    """

    def train(self, name: str, seed: int, objective: dict, roles: dict, *, share: float = 1.0, guided: bool = False, **changes):
        """Workdir of a student; `share` of the budget. guided: the objective wraps the teacher in its guidance."""
        if guided and self.guidance:
            objective = objective | {"guidance": self.guidance}
        settings = common.config(self.base, seed=seed, batch_size=self.batch, model=self.model)
        settings |= {
            "objective": objective, "roles": {role: v if isinstance(v, dict) else {"checkpoint": str(v)} for role, v in roles.items()},
            "optimizer": {"name": "adamw", "clip": 1.0, "schedule": {"name": "cosine", "rate": self.rate, "warmup": 20}},
            "ema": {"ema": {"name": "warmup", "decay": 0.99}}, "steps": 1,
        }  # fmt: skip
        for key, value in changes.items():
            settings[key] = settings[key] | value if key in ("model", "ema", "sample") else value
        settings["sample"] |= {"every": 0, "guidance": "none"}
        settings["validation"] |= {"every": 0}
        workdir = f"distillation/{self.name}/{self.budget}/{name}/{seed}"
        # The cost is that of the first time, so that a workdir is found again without asking for it.
        file = pathlib.Path(common.RUNS.value) / workdir / "config.json"
        known = json.loads(file.read_text())["config"]["steps"] if file.exists() else 0
        settings["steps"] = known or max(1, round(share * self.budget * self.unit() / cost(settings)))
        settings["checkpoint"] |= {"every": settings["steps"]}
        return common.train(workdir, settings)

    @property
    def scratch(self) -> dict:
        """Changes for a network that begins from nothing: the teacher's own optimizer."""
        return {"optimizer": self.own(0)["optimizer"]}

    @functools.cache
    def unit(self) -> int:
        """FLOP of a step of the teacher's own training."""
        return cost(self.own(0))

    def coupled(self, source, name: str, seed: int, guided: bool) -> dict:
        """The data section of couplings made by a checkpoint."""
        made_by = "" if name == "teacher" else f"{self.budget}/"
        out = pathlib.Path(common.RUNS.value).absolute() / f"distillation/{self.name}/{made_by}couplings/{name}/{seed}"
        if not (out / "manifest.json").exists():
            how = ["--guidance=" + (str(self.guidance["scale"]) if guided and self.guidance else "none"), *self.couplings]
            began = time.monotonic()
            common.binary("tools.make_couplings", f"--checkpoint={pathlib.Path(source).absolute()}", f"--out={out}", f"--seed={1000 + seed}", *how)
            out.with_suffix(".seconds").write_text(f"{time.monotonic() - began:.1f}")
        return {"name": "array_record", "path": str(out)}


class Plane(Part):
    """Four Gaussians without labels."""

    name, base, model, batch, budget, rate, guidance, finest = "plane", "mix4", {"num_classes": 0}, 1024, 3000, 1e-3, None, 32
    smooth = {"time_scale": 10.0}  # of networks that are differentiated by t
    # Norms of single examples, which hardly differ between images, favour some points of a plane over others.
    plain = {"meanflow": {"power": 0.0}, "scm_training": {"normalise": False}}
    couplings = ("--count=50000", "--sampler=rk4", "--steps=50", "--batch=5000")
    couplings_cost = 50_000 * 50 * 4 / (3000 * 1024 * 3)  # network passes; a train step has three
    notes = ()
    measures = {
        "sliced W2": "sliced 2-Wasserstein distance of 20,000 points to 20,000 of the mixture", "W2": "2-Wasserstein distance of 1,500 to 1,500",
    }  # fmt: skip

    def own(self, seed):
        return common.config("mix4", seed=seed, batch_size=self.batch, model=self.model, objective={"label_drop": 0.0})

    def start(self, seed):
        """What students start as: a network trained on the data, which is not the teacher."""
        settings = self.own(seed)
        settings["sample"]["every"] = 0
        return common.train(f"distillation/plane/start/{seed}", settings)

    def teacher(self, seed):
        """An export of the exact network."""
        import jax

        from flowjax.models.mixture import Mixture
        from flowjax.train import export

        out = pathlib.Path(common.RUNS.value) / "distillation/plane/exact"
        if not (out / "config.json").exists():
            params = Mixture().init(jax.random.key(0), np.zeros((1, 2), np.float32), np.ones(1, np.float32), {})["params"]
            info = {
                "model": {"name": "mixture"}, "path": {"name": "rectified"}, "prediction": "velocity", "shape": [2], "num_classes": 0,
                "image_shape": [2], "conditions": {}, "config": self.own(seed), "step": 0, "weights": "exact",
            }  # fmt: skip
            export.write(out, params, info)
        return out

    def measure(self, workdir, seed, steps, sampler):
        weights = "exact" if workdir == self.teacher(seed) else "ema"
        return distances(common.draw(workdir, {}, 20_000, seed=seed, steps=steps, sampler=sampler, weights=weights), seed)

    def floor(self, seed):
        """What is left between two sets of true points."""
        return distances(truth(20_000, 100 + seed), seed)


class Digits(Part):
    """8x8 digits by class."""

    name, base, model, batch, budget, rate, guidance, finest = "digits", "digits", {}, 128, 1500, 5e-4, {"name": "cfg", "scale": 1.5}, 16
    smooth = {"time_scale": 1.0}
    plain = {"meanflow": {}, "scm_training": {}}
    couplings = ("--count=10000", "--sampler=rk4", "--steps=10", "--batch=500")
    couplings_cost = 10_000 * 10 * 4 * 2 / (1500 * 128 * 3)
    notes = ("All are guided (scale 1.5), which raises agreement and distance alike, but consistency training, sCM training and IMM.", "")
    measures = {
        "ratio": "Frechet distance of pixels to held-out digits, divided by that of the training digits",
        "agreement": "class agreement %, by a scikit-learn SVM", "coverage": "coverage of held-out digits %",
    }  # fmt: skip

    def own(self, seed):
        return common.config("digits", seed=seed)

    def teacher(self, seed):
        from experiments.studies import digits

        return digits.teacher(seed)

    start = teacher

    def measure(self, workdir, seed, steps, sampler):
        scale = self.guidance["scale"] if workdir == self.teacher(seed) else None
        options = {"steps": steps, "sampler": sampler, "guidance": scale}
        found = common.measure(workdir, seed=seed, metrics=("frechet", "agreement", "prdc"), data={"name": "digits"}, **options)
        coverage = next(iter(found["prdc"].values()))["coverage"]
        return {"ratio": common.frechet(found)["ratio"], "agreement": 100 * found["agreement"]["agreement"], "coverage": 100 * coverage}

    def floor(self, seed):
        return {}


def distances(x, seed: int) -> dict:
    """What the plane measures of 20,000 points."""
    true = truth(len(x), seed)
    return {"sliced W2": sliced(x, true), "W2": wasserstein(x[:1500], true[:1500])}


def truth(count: int, seed: int) -> np.ndarray:
    """Points of the four Gaussians."""
    import jax

    from flowjax import exact

    return np.asarray(exact.mix4().sample(jax.random.fold_in(jax.random.key(7), seed), count))


def wasserstein(a, b) -> float:
    """2-Wasserstein distance of two equal numbers of points (N, D): root of the mean squared distance of the best pairing."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    costs = cdist(a, b, "sqeuclidean")
    return float(np.sqrt(costs[linear_sum_assignment(costs)].mean()))


def sliced(a, b, directions: int = 180) -> float:
    """Sliced 2-Wasserstein distance of two equal numbers of points of the plane: the root of the mean square over directions, in each of
    which points are paired in order. Of a shift by v it is |v| / sqrt 2."""
    angles = np.pi * np.arange(directions) / directions
    lines = np.stack([np.cos(angles), np.sin(angles)])
    a, b = (np.sort(np.asarray(v, np.float64) @ lines, axis=0) for v in (a, b))
    return float(np.sqrt(np.mean((a - b) ** 2)))


# Each method: (part, seed) -> {steps: (workdir, sampler)}.


def teaching(part, seed):
    """The frozen teacher, and the student that begins as its network."""
    return {"teacher": part.teacher(seed), "net": part.start(seed)}


def always(workdir, sampler):
    return {n: (workdir, sampler) for n in STEPS}


def output(part, seed):
    pairs = part.coupled(part.teacher(seed), "teacher", seed, guided=True)
    objective = {"name": "flow_matching", "time": ONE_STEP}
    return {1: (part.train("output", seed, objective, {"net": part.start(seed)}, data=pairs), "euler")}


def reflowed(part, seed, k, share):
    """The network after k reflows, `share` of the budget each."""
    if k == 0:
        return part.start(seed)
    before = reflowed(part, seed, k - 1, share)
    source, name = (before, f"reflow_{k - 1}_{share}") if k > 1 else (part.teacher(seed), "teacher")
    pairs = part.coupled(source, name, seed, guided=k == 1)
    return part.train(f"reflow_{k}_{share}", seed, {"name": "flow_matching", "time": UNIFORM}, {"net": before}, data=pairs, share=share)


def reflow(part, seed):
    return always(reflowed(part, seed, 1, 1.0), "euler")


def reflow_twice(part, seed):
    return always(reflowed(part, seed, 2, 0.5), "euler")


def instaflow(part, seed):
    straight = reflowed(part, seed, 1, 0.5)
    pairs = part.coupled(straight, "reflow_1_0.5", seed, guided=False)
    objective = {"name": "flow_matching", "time": ONE_STEP}
    return {1: (part.train("instaflow", seed, objective, {"net": straight}, data=pairs, share=0.5), "euler")}


def progressive(part, seed):
    counts = [part.finest // 2**i for i in range(1, part.finest.bit_length())]
    teacher, net, found = part.teacher(seed), part.start(seed), {}
    for n in counts:
        objective = {"name": "progressive_distillation", "steps": n}
        roles = {"teacher": teacher, "net": net}
        teacher = net = part.train(f"progressive/{n}", seed, objective, roles, share=1 / len(counts), guided=n == counts[0])
        found[n] = net, "ddim"
    return {n: found[n] for n in STEPS}


def consistency_distillation(part, seed):
    objective = {"name": "consistency_distillation", "steps": 16, "solver": "heun", "metric": "pseudo_huber", "huber": 0.03}
    averages = {"target": {"name": "constant", "decay": 0.95}}
    return always(part.train("consistency_distillation", seed, objective, teaching(part, seed), guided=True, ema=averages), "renoise")


def consistency_training(part, seed):
    objective = {"name": "consistency_training", "steps": 16, "metric": "pseudo_huber", "huber": 0.03}
    averages = {"target": {"name": "constant", "decay": 0.0}}
    return always(part.train("consistency_training", seed, objective, {"net": part.start(seed)}, ema=averages), "renoise")


def matching(steps):
    """Distribution matching with a student of so many steps."""

    def method(part, seed):
        objective = {"name": "distribution_matching", "steps": steps, "time": {"name": "uniform", "t_min": 0.02, "t_max": 0.98}}
        adam = {"name": "adamw", "b1": 0.0, "b2": 0.99, "clip": 1.0, "schedule": {"name": "constant", "rate": part.rate / 2, "warmup": 20}}
        start = {"checkpoint": str(part.start(seed))}
        roles = {"teacher": part.teacher(seed), "net": start | {"every": 5}, "fake": start | {"optimizer": adam}}
        return {steps: (part.train(f"distribution_matching_{steps}", seed, objective, roles, guided=True, optimizer=adam), "renoise")}

    return method


def meanflow(part, seed):
    guide = {"scale": 1.0, "mix": 1 - 1 / part.guidance["scale"], "label_drop": 0.1} if part.guidance else {}
    objective = {"name": "meanflow", "time": {"name": "logit_normal", "mean": -0.4, "std": 1.0, "stratified": True}, "same": 0.75}
    changes = part.scratch | {"model": {"step_embed": True} | part.smooth}
    return always(part.train("meanflow", seed, objective | guide | part.plain["meanflow"], {}, **changes), "flow_map")


def shortcut(part, seed):
    guide = {"guidance": part.guidance["scale"], "label_drop": 0.1} if part.guidance else {}
    objective = {"name": "shortcut", "time": UNIFORM, "bootstrap": 0.25, "finest": 32} | guide
    averages = {"target": {"name": "constant", "decay": 0.99}}
    return always(part.train("shortcut", seed, objective, {}, model={"step_embed": True}, ema=averages, **part.scratch), "flow_map")


def gan(part, seed):
    """DMD2 in one step: the discriminator is the teacher's network with a head on its features, which the plane's have none of."""
    if part.base == "mix4":
        return {}
    objective = {"name": "distribution_matching_gan", "steps": 1, "adversarial_weight": 3e-3, "time": {"name": "uniform", "t_min": 0.02, "t_max": 0.98}}
    adam = {"name": "adamw", "b1": 0.0, "b2": 0.99, "clip": 1.0, "schedule": {"name": "constant", "rate": part.rate / 2, "warmup": 20}}
    start = {"checkpoint": str(part.start(seed))}
    judge = start | {"model": part.own(seed)["model"] | {"projector": {"layer": 2, "features": 1, "hidden": 64}}, "optimizer": adam}
    roles = {"teacher": part.teacher(seed), "net": start | {"every": 5}, "fake": start | {"optimizer": adam}, "discriminator": judge}
    return {1: (part.train("distribution_matching_gan", seed, objective, roles, guided=True, optimizer=adam), "renoise")}


def continuous(name):
    """sCM, with a teacher or without."""

    def method(part, seed):
        objective = {"name": name, "time": {"name": "edm_lognormal", "p_mean": -0.8, "p_std": 1.6, "stratified": True}, "warmup": 500}
        roles = {"teacher": part.teacher(seed)} if name == "scm_distillation" else {}
        changes = part.scratch | {"model": part.smooth}
        return always(part.train(name, seed, objective | part.plain.get(name, {}), roles, guided=bool(roles), **changes), "renoise")

    return method


def moments(steps):
    def method(part, seed):
        objective = {"name": "moment_matching", "steps": steps, "time": {"name": "uniform", "t_min": 0.02}}
        adam = {"name": "adamw", "b1": 0.0, "b2": 0.99, "clip": 1.0, "schedule": {"name": "cosine", "rate": part.rate, "warmup": 20}}
        roles = teaching(part, seed) | {"auxiliary": part.start(seed)}
        return {steps: (part.train(f"moment_matching_{steps}", seed, objective, roles, guided=True, optimizer=adam), "ancestral")}

    return method


def inductive(part, seed):
    """IMM; its guidance is at sampling, so that of digits goes without."""
    objective, begin = {"name": "inductive_moment_matching", "particles": 4}, {"grid": {"name": "uniform", "t_start": 0.994}}
    return always(part.train("imm", seed, objective, {}, model={"step_embed": True}, sample=begin, **part.scratch), "flow_map")


METHODS = {
    "output distillation": output,
    "reflow": reflow,
    "reflow twice": reflow_twice,
    "reflow, then output (InstaFlow)": instaflow,
    "progressive distillation": progressive,
    "consistency distillation": consistency_distillation,
    "consistency training": consistency_training,
    "distribution matching, 1 step": matching(1),
    "distribution matching, 4 steps": matching(4),
    "distribution matching with a GAN, 1 step": gan,
    "MeanFlow, from nothing": meanflow,
    "shortcut model, from nothing": shortcut,
    "sCM distillation, from nothing": continuous("scm_distillation"),
    "sCM training, from nothing": continuous("scm_training"),
    "moment matching, 1 step": moments(1),
    "moment matching, 4 steps": moments(4),
    "IMM, from nothing": inductive,
}


def main():
    runtime.setup()
    part, seeds = {"plane": Plane, "digits": Digits}[PART.value](), range(common.SEEDS.value)
    part.budget = BUDGET.value or part.budget
    found = {}  # (row, steps) -> measurements, one a seed

    def measured(name, runs):
        for seed, run in enumerate(runs):
            for n, (workdir, sampler) in run.items():
                found.setdefault((name, n), []).append(part.measure(workdir, seed, n, sampler))

    measured("teacher", [always(part.teacher(s), "euler") for s in seeds])
    measured("teacher", [{25: (part.teacher(s), "heun")} for s in seeds])
    trained = {}
    for name, method in METHODS.items():
        if CHOSEN.value and not any(word in name for word in CHOSEN.value):
            continue
        runs = [method(part, s) for s in seeds]
        if not runs[0]:
            continue
        info = json.loads((pathlib.Path(next(iter(runs[0].values()))[0]) / "config.json").read_text())
        trained[name] = info["config"]["steps"]
        measured(name, runs)
        write(part, seeds, found, trained)
    return 0


def write(part, seeds, found, trained):
    """The page, its tables and its figure; under another name while --methods leaves some out."""
    title = f"distillation_{part.name}" + "_part" * bool(CHOSEN.value)
    text = [
        f"# Distillation: {part.name}", "",
        f"`python -m experiments.study distillation --part={part.name} --seeds={len(seeds)}`: mean ± standard deviation over the seeds.", "",
        f"{part.__doc__} Every method has the computation of {part.budget:,} of the teacher's training steps; the last column says how many steps",
        "of its own (of its last stage) these were. Progressive distillation shares it among its stages, so that its students of more steps",
        f"have had less. Couplings (output distillation, reflow, InstaFlow) cost as much as {part.couplings_cost:.2g} such budgets besides, each time they are",
        "made. Students begin as a network trained on the data, for which the others, from nothing, are not repaid.", "", *part.notes,
    ]  # fmt: skip
    names = list(dict.fromkeys(name for name, _ in found))
    for i, (key, meaning) in enumerate(part.measures.items()):
        rows = []
        for name in names:
            cells = [common.spread([m[key] for m in found[name, n]]) if (name, n) in found else "" for n in (*STEPS, 25)]
            rows.append([name, *cells, trained.get(name, "")])
        floor = [part.floor(s).get(key) for s in seeds]
        text += [f"## {meaning}", ""] + ([f"Of true samples: {common.spread(floor)}.", ""] if None not in floor else [])
        head = ["Euler, or the method's own sampler", *(f"{n} step{'s' * (n > 1)}" for n in STEPS), "25 steps of Heun", "trained steps"]
        text += [common.table(f"{title}_{i}", head, rows), ""]

    key = next(iter(part.measures))

    def draw(axes):
        for i, name in enumerate(names):
            points = [(n, np.mean([m[key] for m in found[name, n]])) for n in STEPS if (name, n) in found]
            if points:
                axes.plot(*zip(*points), ("o-", "s:")[i // 10] if i else "k--", ms=3, color=f"C{i}" if i else "k", label=name)
        axes.set(xlabel="steps", ylabel=key, xscale="log", yscale="log", xticks=STEPS, xticklabels=STEPS)
        axes.minorticks_off()
        axes.legend(fontsize=6, bbox_to_anchor=(1.01, 1), loc="upper left")

    common.figure(title, draw, (8, 4))
    text += [f"![{key} over steps]({title}.png)"]
    common.page(title, "\n".join(text))
