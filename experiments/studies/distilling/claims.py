"""What was published, or is to be reached, held against what was measured: computed, not judged."""

import numpy as np

# Methods that learn without guidance, also where the teacher has it.
UNGUIDED = ("consistency training", "adversarial distillation (LADD)", "sCM training, from nothing", "IMM, from nothing")


class Found:
    """Measurements of a part: {(method, steps): [one a seed]}, and {method: [straightness, one a seed]}."""

    def __init__(self, part, measured: dict, straight: dict):
        self.part, self.measured, self.straight = part, measured, straight
        self.key = next(iter(part.measures))
        self.rows = []

    def mean(self, name: str, steps: int, key: str = ""):
        """Over the seeds; None where it was not measured."""
        found = self.measured.get((name, steps))
        return None if not found else float(np.mean([m[key or self.key] for m in found]))

    def bent(self, name: str):
        return float(np.mean(self.straight[name])) if self.straight.get(name) else None

    def noise(self, name: str, steps: int) -> float:
        """Twice the standard deviation over seeds, or a tenth of the value where there is one seed."""
        values = [m[self.key] for m in self.measured[name, steps]]
        return float(2 * np.std(values, ddof=1)) if len(values) > 1 else 0.1 * abs(values[0])

    def claim(self, text: str, numbers: dict, holds, words=("agrees", "disagrees")):
        """A row: the claim, the numbers it is about (None: not measured), and whether holds(*numbers)."""
        missing = [k for k, v in numbers.items() if v is None]
        told = f"not measured: {', '.join(missing)}" if missing else ", ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.rows.append([text, told, "" if missing else words[0] if holds(*numbers.values()) else words[1]])

    def one_step(self) -> dict:
        """{method: distance} of the students in one step."""
        return {name: self.mean(name, 1) for name, n in self.measured if n == 1 and name != "teacher" and "tangent" not in name}


def directions(part, measured: dict, straight: dict) -> list[list]:
    """Rows [claim, numbers, agrees or disagrees]: distances, where nothing else is said."""
    f, modes = Found(part, measured, straight), part.modes
    pd = "progressive distillation"
    f.claim(
        "progressive distillation loses a little with each halving (2202.00512): never half, where the teacher's Euler loses more",
        {f"{n} steps": f.mean(pd, n) for n in (8, 4, 2, 1)} | {"teacher in 8": f.mean("teacher", 8), "in 1": f.mean("teacher", 1)},
        lambda *v: all(b < 2 * a for a, b in zip(v[:4], v[1:4])) and v[3] / v[0] < v[5] / v[4],
    )
    f.claim(
        "reflow straightens (2209.03003), the first one most",
        {"teacher": f.bent("teacher"), "once": f.bent("reflow"), "twice": f.bent("reflow twice")},
        lambda a, b, c: b < a and a - b > abs(b - c),
    )
    f.claim(
        "distillation after reflow beats distillation before it (2309.06380), in one step",
        {"before": f.mean("output distillation", 1), "after": f.mean("reflow, then output (InstaFlow)", 1)}, lambda a, b: b < a,
    )  # fmt: skip
    f.claim(
        "consistency distillation beats consistency training (2303.01469)" + "; here the first alone is guided" * bool(part.guidance),
        {f"{kind} in {n}": f.mean(f"consistency {kind}", n) for n in (1, 2) for kind in ("distillation", "training")},
        lambda a, b, c, d: a < b and c < d,
    )
    dmd = "distribution matching, 1 step"
    others = {"with regression": "distribution matching with regression, 1 step", "with a GAN": "distribution matching with a GAN, 1 step"}
    for how, name in others.items():
        f.claim(
            f"distribution matching loses modes that it keeps {how} (2311.18828, 2405.14867): {part.measures[modes].split(' (')[0]}",
            {"without": f.mean(dmd, 1, modes), how: f.mean(name, 1, modes)}, lambda a, b: a < b,
        )  # fmt: skip
    if "precision" in part.measures:
        gan = others["with a GAN"]
        f.claim(
            "a GAN raises sharpness (precision %) and lowers recall",
            {f"{k} {how}": f.mean(name, 1, k) for k in ("precision", "recall") for how, name in (("without", dmd), ("with", gan))},
            lambda a, b, c, d: b > a and d < c,
        )
    wrong = {v: f.mean(f"MeanFlow, tangent ({v})", 1) for v in ("v, 1, 1", "v, 0, 0", "v, 1, 0")}
    if all(v is not None for v in wrong.values()):
        f.claim(
            "MeanFlow's wrong tangents rank as published, right first (2505.13447 table 1b: FID 61, 138, 268, 329)",
            {"v, 0, 1": f.mean("MeanFlow, from nothing", 1)} | wrong, lambda *v: list(v) == sorted(v),
        )  # fmt: skip
    if part.guidance:
        n = max(part.steps)
        f.claim(
            f"guidance distillation equals two passes within the noise (2210.03142), Euler in {n}",
            {"two passes": f.mean("teacher", n), "one": f.mean("guidance distillation", n)}, lambda a, b: abs(a - b) <= f.noise("teacher", n),
        )  # fmt: skip
    return f.rows


def goals(part, measured: dict) -> list[list]:
    """Rows [figure to reach, numbers, reached or not]."""
    f, words = Found(part, measured, {}), ("reached", "not reached")
    peers = lambda found: {k: v for k, v in found.items() if v is not None and not (part.guidance and k in UNGUIDED)}  # noqa: E731
    students = peers(f.one_step())
    if not students:
        return []
    if part.name == "plane":
        four, one = f.mean("teacher", 4), f.mean("teacher", 1)
        under = sum(v < four / 2 for v in students.values())
        f.claim("six methods in one step under half of four steps of Euler", {"methods": under, "half": four / 2}, lambda n, _: n >= 6, words)
        worst = max(students, key=students.get)
        f.claim(
            "every method beats one step of Euler, by half at least", {f"worst ({worst})": students[worst], "Euler": one}, lambda a, b: a < b / 2, words
        )
        return f.rows
    teacher, kind = f.mean("teacher", 50), "guided student" if part.guidance else "student"
    # What is near at the price of the asked class, as less guidance is, is no match for the teacher.
    agreement = {name: f.mean(name, 1, "agreement") for name in students}
    best = min(students, key=lambda name: (agreement[name] < 95, students[name]))
    f.claim(
        f"a {kind} in one step has 95 % class agreement within twice the distance of the teacher in 50",
        {best: students[best], "teacher": teacher, "agreement": agreement[best]}, lambda a, b, right: a <= 2 * b and right >= 95, words,
    )  # fmt: skip
    four = peers({name: f.mean(name, 4) for name, n in measured if n == 4 and name != "teacher"})
    if four:
        best = min(four, key=four.get)
        f.claim(f"the best {kind} in four steps within 1.25 times", {best: four[best], "teacher": teacher}, lambda a, b: a <= 1.25 * b, words)
    return f.rows
