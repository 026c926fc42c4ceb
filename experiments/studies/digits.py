"""The figures of the README: digits teacher, one- and two-step student, preference tuning; means over seeds.

    python -m experiments.study digits
"""

import numpy as np

from experiments.studies import common
from flowjax.train import runtime

UNGUIDED, GUIDED = {"guidance": None}, {"guidance": 2.0}


def teacher(seed: int):
    """A finished run of configs/digits.py."""
    return common.train(f"digits/{seed}", common.config("digits", seed=seed))


def pairs(seed: int, workdir, count: int = 1000):
    """Preference pairs of a teacher, made where they are not: best against worst of 4 unguided samples by their ink, `count` times."""
    from flowjax.data.sources import write_preferences
    from flowjax.evals import image, protocol, rewards

    out = workdir / "pairs"
    if not out.exists():
        labels = np.repeat(protocol.labels(count, 10, "balanced", 100 + seed), 4)
        x = image.quantise(common.samples(workdir, labels, seed=100 + seed, **UNGUIDED), sampled=True)
        scores = rewards.reward("ink", x, labels).reshape(-1, 4)
        win, lose, kept = rewards.best_and_worst(x.reshape(-1, 4, *x.shape[1:]), scores)
        write_preferences(out, win, lose, labels[::4][kept], 10, {"reward": "ink", "seed": 100 + seed})
    return out


def main():
    runtime.setup()
    from flowjax.evals import agreement, image, protocol, rewards

    seeds = range(common.SEEDS.value)
    teachers = [teacher(s) for s in seeds]

    # --- the teacher
    rows = []
    for name, how in (("guidance 2", GUIDED), ("guidance 1.5", {"guidance": 1.5}), ("no guidance", UNGUIDED)):
        results = [common.measure(w, seed=s, **how) for s, w in zip(seeds, teachers)]
        near = [next(iter(r["memorisation"].values())) for r in results]
        rows.append([
            name, common.spread([100 * r["agreement"]["agreement"] for r in results]),
            common.spread([common.frechet(r)["distance"] for r in results]),
            common.spread([common.frechet(r)["ratio"] for r in results]),
            f"{sum(n['flagged'] for n in near)} of {len(near)}", common.spread([100 * n["exact_copies"] for n in near]),
        ])  # fmt: skip
    judge = results[0]["agreement"]["judge_accuracy"]
    text = [
        "# Digits", "",
        f"{common.measured_by('digits')}, 1,000 samples each.",
        f"The judge is a scikit-learn SVM that scores {100 * judge:.1f} % on held-out digits. FD-pixels: Frechet distance of pixels",
        "to the 297 held-out digits; ratio: divided by that of the 1,500 training digits.", "",
        "## The teacher: rectified flow, 2,000 steps, Heun with 25 steps", "",
        common.table("digits_teacher", ["sampling", "class agreement %", "FD-pixels", "ratio", "memorisation flagged", "exact copies %"], rows),
    ]

    # --- consistency distillation
    students = [
        common.train(f"digits_cd/{s}", common.config(
            "digits_cd", seed=s, roles={r: {"checkpoint": str(w)} for r in ("teacher", "net")}
        ))
        for s, w in zip(seeds, teachers)
    ]  # fmt: skip
    rows = []
    cases = [("teacher, Heun 25 (50 evaluations), guidance 2", teachers, {"steps": 25, **GUIDED})]
    cases += [(f"teacher, Euler {n}, guidance 2", teachers, {"steps": n, "sampler": "euler", **GUIDED}) for n in (1, 2, 4)]
    cases += [(f"student, {n} step{'s' * (n > 1)}", students, {"steps": n, "sampler": "renoise"}) for n in (1, 2, 4)]
    for name, workdirs, options in cases:
        results = [common.measure(w, seed=s, **options) for s, w in zip(seeds, workdirs)]
        rows.append([
            name, common.spread([100 * r["agreement"]["agreement"] for r in results]),
            common.spread([common.frechet(r)["distance"] for r in results]),
        ])  # fmt: skip
    head = ["sampler", "class agreement %", "FD-pixels"]
    text += ["", "## Consistency distillation (guidance 2 baked in), 500 steps", "", common.table("digits_cd", head, rows)]

    # --- preference
    rates, drops, inks, tuned0 = [], [], [], None
    for s, w in zip(seeds, teachers):
        tuned = common.train(f"digits_dpo/{s}", common.config(
            "digits_dpo", seed=s, data={"path": str(pairs(s, w))}, roles={r: {"checkpoint": str(w)} for r in ("reference", "net")}
        ))  # fmt: skip
        tuned0 = tuned if s == 0 else tuned0
        labels = protocol.labels(1000, 10, "balanced", 200 + s)
        before, after = (image.quantise(common.samples(d, labels, seed=200 + s, **UNGUIDED), sampled=True) for d in (w, tuned))
        real = common.real(w)["train"]
        svm = agreement.judge("svm", image.quantise(real["x"]), real["label"])
        agree = [agreement.agreement(x, labels, svm)["agreement"] for x in (before, after)]
        ink = [rewards.reward("ink", x, labels) for x in (before, after)]
        rates.append(100 * rewards.win_rate(ink[1], ink[0]))
        drops.append(100 * (agree[1] - agree[0]))
        inks.append((ink[0].mean(), ink[1].mean()))
    rows = [[common.spread(rates), common.spread(drops), *(common.spread(v) for v in zip(*inks))]]
    head = ["win rate % over the reference", "class agreement, change in points", "ink before", "ink after"]
    text += [
        "", "## Diffusion-DPO: prefer more ink, best against worst of 4 samples, 1,000 pairs, 300 steps", "",
        "Fresh noise and labels, the same for both; no guidance.", "", common.table("digits_dpo", head, rows),
    ]  # fmt: skip
    common.picture("digits_teacher", teachers[0], **GUIDED)
    common.picture("digits_student", students[0], steps=2, sampler="renoise")
    common.picture("digits_reference", teachers[0], **UNGUIDED)
    common.picture("digits_preferred", tuned0, **UNGUIDED)
    text += ["", "Teacher (guidance 2, 25 steps), student (2 steps), reference and its tuned version (no guidance), same noise:", ""]
    text += [f"![{name}](digits_{name}.png)" for name in ("teacher", "student", "reference", "preferred")]
    common.page("digits", "\n".join(text))
