"""Every road from many steps to one, on equal terms: one teacher, one network, one budget of computation.

    python -m experiments.study distillation --part=plane                       four Gaussians, taught by their exact velocity; half an hour
    python -m experiments.study distillation --part=digits                      taught by the networks of experiments.study digits; hours a seed
    python -m experiments.study distillation --part=mnist --data=data/mnist     by that of experiments.study mnist, in its latent space
    python -m experiments.study distillation --part=pixels --data=data/mnist    in pixels, JiT
    python -m experiments.study distillation --part=emoji --data=data/emoji     from captions: five methods

A budget is counted in steps of the teacher's own training: a method whose step costs twice as much takes half as many. What it takes
to make couplings is not in it, and is told beside.
"""

import json
import pathlib

import numpy as np
from absl import flags

from experiments.studies import common
from experiments.studies.distilling import claims, methods, parts
from flowjax.train import runtime

PART = flags.DEFINE_enum("part", "plane", list(parts.PARTS), "Which data set.")
CHOSEN = flags.DEFINE_list("methods", [], "Methods to run, by a part of their names; none: all.")
BUDGET = flags.DEFINE_integer("budget", 0, "Steps of the teacher's training that each method's computation amounts to; 0: the part's own.", lower_bound=0)
STRAIGHT = ("teacher", "reflow", "reflow twice", "reflow three times")  # whose straightness is measured
HEUN = 25


def main():
    runtime.setup()
    part, seeds = parts.PARTS[PART.value](), range(common.SEEDS.value)
    part.budget = BUDGET.value or part.budget
    study = Study(part, seeds)
    study.add("teacher", [methods.always(part, part.teacher(s), "euler") for s in seeds])
    study.add("teacher", [{HEUN: (part.teacher(s), "heun")} for s in seeds])
    for name, method in methods.of(part, CHOSEN.value).items():
        runs, spent = [], []
        for seed in seeds:
            part.spent = []
            runs.append(method(part, seed))
            spent.append(part.spent)
        if runs[0]:
            study.add(name, runs, spent)
            study.write()
    return 0


class Study:
    """What was found of one part so far, and its page."""

    def __init__(self, part, seeds):
        self.part, self.seeds = part, seeds
        self.found = {}  # (method, steps) -> measurements, one a seed
        self.spent, self.trained, self.straight, self.one = {}, {}, {}, None

    def add(self, name: str, runs: list, spent=()):
        """Measure the runs of a method, one a seed: {steps: (workdir, sampler[, guidance])}."""
        for seed, run in enumerate(runs):
            for n, (workdir, *how) in run.items():
                self.found.setdefault((name, n), []).append(self.part.measure(workdir, seed, n, *how))
        dirs = [next(iter(run.values()))[0] for run in runs]
        if name in STRAIGHT and name not in self.straight and self.part.classes:
            self.straight[name] = [self.part.straightness(workdir, seed) for seed, workdir in enumerate(dirs)]
        if name != "teacher":
            self.trained[name] = json.loads((pathlib.Path(dirs[0]) / "config.json").read_text())["config"]["steps"]
            self.spent[name] = spent
        if name == "output distillation":
            self.one = dirs[0]

    def write(self):
        """The page, its tables and its figure; under another name while --methods leaves some out."""
        part, title = self.part, f"distillation_{self.part.name}" + "_part" * bool(CHOSEN.value)
        budget = f" --budget={BUDGET.value}" * bool(BUDGET.value)
        text = [
            f"# Distillation: {part.name}", "",
            f"`python -m experiments.study distillation --part={part.name}{common.of_data()}{budget} --seeds={len(self.seeds)}`: mean ± standard deviation over "
            "the seeds.", "",
            f"{part.__doc__} Every method has the computation of {part.budget:,} of the teacher's training steps. Progressive distillation shares it",
            "among its stages, so that its students of more steps have had less. Couplings are not in it: what they took is told beside. Students",
            "begin as a network trained on the data, for which the others, from nothing, are not repaid.", "", *part.notes,
        ]  # fmt: skip
        names = list(dict.fromkeys(name for name, _ in self.found))
        steps = (*part.steps, HEUN)
        for i, (key, meaning) in enumerate(part.measures.items()):
            rows = [
                [name, *(common.spread([m[key] for m in self.found[name, n]]) if (name, n) in self.found else "" for n in steps)] for name in names
            ]
            floor = [part.floor(s).get(key) for s in self.seeds]
            text += [f"## {meaning}", ""] + ([f"Of true samples: {common.spread(floor)}.", ""] if None not in floor else [])
            head = ["Euler, or the method's own sampler", *(f"{n} step{'s' * (n > 1)}" for n in part.steps), f"{HEUN} steps of Heun"]
            text += [common.table(f"{title}_{i}", head, rows), ""]
        text += self.costs(title) + self.rest(title)

        key = next(iter(part.measures))

        def draw(axes):
            for i, name in enumerate(names):
                points = [(n, np.mean([m[key] for m in self.found[name, n]])) for n in part.steps if (name, n) in self.found]
                if points:
                    style = ("o-", "s:", "^--", "v-.")[i // 10 % 4] if i else "--"
                    axes.plot(*zip(*points), style, ms=3, color=f"C{i}" if i else "k", label=name)
            axes.set(xlabel="steps", ylabel=key, xscale="log", yscale="log", xticks=part.steps, xticklabels=part.steps)
            axes.minorticks_off()
            axes.legend(fontsize=5, bbox_to_anchor=(1.01, 1), loc="upper left")

        common.figure(title, draw, (8.5, 5))
        text += [f"![{key} over steps]({title}.png)"]
        common.page(title, "\n".join(text))

    def costs(self, title: str) -> list[str]:
        """What each method took: its own steps, computation in the teacher's steps, minutes."""
        rows = []
        for name, spent in self.spent.items():
            of = lambda what, made: [[e[what] for e in run if e["couplings"] == made] for run in spent]  # noqa: E731, B023
            minutes = [[sum(v) / 60 for v in of("seconds", made) if v and None not in v] for made in (False, True)]
            told = [f"{np.mean(v):.1f}" if v else "" for v in minutes]
            couplings = np.mean([sum(v) for v in of("budget", True)])
            rows.append([name, self.trained[name], f"{np.mean([sum(v) for v in of('budget', False)]):.0f}", f"{couplings:.0f}" if couplings else "", *told])
        head = ["method", "steps of its last stage", "computation, in steps of the teacher", "of couplings", "minutes of training", "of making couplings"]
        return ["## What it took", "", "On whatever else the machine had to do; without compiling.", "", common.table(f"{title}_cost", head, rows), ""]

    def rest(self, title: str) -> list[str]:
        """Straightness, speed, and what was published or is to be reached."""
        part, text = self.part, []
        if self.straight:
            rows = [[name, common.spread(values)] for name, values in self.straight.items()]
            meaning = "E int |(z - x) - v|^2 dt per dimension (2209.03003), 0 where one step is as good as many; 500 trajectories, Euler in 100 steps."
            text += ["## Straightness", "", meaning, "", common.table(f"{title}_straight", ["network", "straightness"], rows), ""]
        if self.one and hasattr(part, "speed"):
            fast = part.speed(self.one, 0, 1, "euler")
            slow = part.speed(part.teacher(0), 0, 50, "euler", part.guidance["scale"])
            text += ["## Speed", "", f"{fast:.0f} images/s in one step, {slow:.1f} of the guided teacher in 50: {fast / slow:.0f} times as many.", ""]
        if part.classes:
            rows = claims.directions(part, self.found, self.straight)
            text += ["## Published directions", "", common.table(f"{title}_claims", ["direction", "measured", ""], rows), ""]
            if rows := claims.goals(part, self.found):
                text += ["## Figures to reach", "", common.table(f"{title}_goals", ["figure", "measured", ""], rows), ""]
        return text
