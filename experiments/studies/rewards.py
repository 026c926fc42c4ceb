"""What a reward buys and what it costs: Flow-GRPO, ReFL, DRaFT, DiffusionNFT, DPO and online DPO on the digits, at equal divergence.

    python -m experiments.study rewards
    python -m experiments.study rewards --tiny --seeds=1 --runs=runs/tiny     # a few steps of each, to see that all of it works

Every run starts from the digits teacher and is asked for more ink. The panel (flowjax.train.panel) measures 400 unguided samples every few
steps, of which the curves are made; variants are run with seed 0 alone.
"""

import pathlib

import numpy as np
from absl import flags

from experiments.studies import common, digits
from flowjax.train import runtime

TINY = flags.DEFINE_bool("tiny", False, "A few steps of tiny networks, whose results go to --runs.")

REWARD = {"ink": 1.0, "upper": 0.0, "symmetry": 0.0}
BOUND = 16.0  # nats
GAIN = 2.0  # standard deviations of the reference's samples
LOST = 2.0  # points of class agreement


def settings(name: str, seed: int, teacher, steps: int, every: int, objective=(), rate: float = 1e-4, stop=(), **changes) -> dict:
    """A run of configs/<name>.py from the teacher, with a panel every so many steps."""
    roles = {"net": {"checkpoint": str(teacher)}}
    if name != "digits_refl":
        roles["reference"] = dict(roles["net"])
    if name == "digits_grpo":
        roles["net"] = roles["net"] | {"updates": 2}
    base = common.config(name, "smoke" if TINY.value else "")
    panel = {"every": 2 if TINY.value else every, "count": 40 if TINY.value else 400, "steps": 8, "rewards": [*REWARD], "stop": dict(stop)}
    objective = {**base["objective"], **dict(objective)}
    if TINY.value:
        small = {k: base["objective"][k] for k in ("group", "steps", "late") if k in base["objective"]}
        objective |= {k: v for k, v in small.items() if k in objective and objective.get("through", 1) == 1}
        objective |= {"steps": 4, "through": 4} if objective.get("through", 1) > 1 else {}
        objective |= {"window": 1} if objective.get("window") else {}
    return base | {
        "seed": seed, "steps": 4 if TINY.value else steps, "roles": roles, "objective": objective, "panel": {**base["panel"], **panel},
        "optimizer": {**base["optimizer"], "schedule": {"name": "constant", "rate": rate, "warmup": 1 if TINY.value else 20}},
        "sample": {**base["sample"], "every": 0}, "checkpoint": {**base["checkpoint"], "every": 0}, **changes,
    }  # fmt: skip


def methods(seed: int, teacher) -> dict[str, dict]:
    """The settings of one run of every method."""
    data = {"data": {"name": "preferences", "path": str(digits.pairs(seed, teacher, 100 if TINY.value else 1000))}}
    late, whole = {"steps": 10, "late": 4, "strength": 8.0}, {"steps": 8, "through": 8, "late": 1, "strength": 1.0}
    return {
        "Flow-GRPO": settings("digits_grpo", seed, teacher, 48, 8, {"beta": 0.3}, 2e-4),
        "ReFL": settings("digits_refl", seed, teacher, 48, 6, late, 3e-5),
        "DRaFT": settings("digits_refl", seed, teacher, 40, 5, whole),
        "DiffusionNFT": settings("digits_nft", seed, teacher, 28, 2, {"anchor": 0.08}),
        "DPO": settings("digits_dpo", seed, teacher, 150, 25, rate=5e-5, **data),
        "online DPO": settings("digits_online_dpo", seed, teacher, 60, 10),
    }


def variants(seed: int, teacher) -> dict[str, dict]:
    """What is varied, of Flow-GRPO and ReFL."""

    def grpo(steps=48, stop=(), **objective):
        return settings("digits_grpo", seed, teacher, steps, 8, {"beta": 0.3, **objective}, 2e-4, stop)

    return {
        "Flow-GRPO, no KL": grpo(32, beta=0.0),
        "Flow-GRPO, no KL, stopped": grpo(32, beta=0.0, stop={"kl": {"above": BOUND}}),
        "Flow-GRPO, groups of 4": grpo(group=4),
        "Flow-GRPO, 2 of 9 steps": grpo(window=2),
        "ReFL, nothing held": settings("digits_refl", seed, teacher, 48, 6, {"steps": 10, "late": 4, "strength": 8.0, "pretrain": 0.0}, 3e-5),
    }


def curve(workdir) -> dict[str, np.ndarray]:
    """The panel's rows of a run: a column for each metric, and "step"."""
    from flowjax.train import log

    rows = [row for row in log.read(workdir / "metrics.jsonl") if "panel/kl" in row]
    names = [k.removeprefix("panel/") for k in rows[0] if k.startswith("panel/")]
    found = {k: np.array([float(row[f"panel/{k}"]) for row in rows]) for k in names} | {"step": np.array([row["step"] for row in rows])}
    return found | {"gain": (found["ink"] - found["ink"][0]) / found["ink/sd"][0]}


def within(c, bound: float) -> int:
    """Number of the row of the highest reward among those whose divergence and loss of class agreement are within their bounds."""
    kept = (c["kl"] <= bound) & (100 * (c["agreement"] - c["agreement"][0]) >= -LOST - 1e-6)  # shares of samples are not exact in binary
    return int(np.argmax(np.where(kept, c["gain"], -np.inf)))


def at(c, bound: float) -> float:
    """Gain where the curve first comes to this divergence, between rows; not a number where it does not."""
    beyond = np.flatnonzero(c["kl"] >= bound)
    if not len(beyond) or not beyond[0]:
        return float("nan")
    i = beyond[0]
    return float(np.interp(bound, c["kl"][i - 1 : i + 1], c["gain"][i - 1 : i + 1]))


def columns(curves, where=None) -> list[str]:
    """Cells of the table: what the rows `where` (of each curve its own, or the last ones) say, mean and spread over curves."""
    rows = [(c, -1 if where is None else where(c)) for c in curves]
    spread = lambda of: common.spread([of(c, i) for c, i in rows])  # noqa: E731
    names = ("symmetry", "upper", "frechet/pixels")
    return [
        spread(lambda c, i: c["step"][i]), spread(lambda c, i: c["kl"][i]), spread(lambda c, i: c["gain"][i]),
        spread(lambda c, i: 100 * (c["agreement"][i] - c["agreement"][0])), spread(lambda c, i: 100 * c["diversity"][i] / c["diversity"][0]),
        *(f"{common.spread([c[k][0] for c, _ in rows])} -> {spread(lambda c, i, k=k: c[k][i])}" for k in names),
    ]  # fmt: skip


HEAD = ["step", "KL, nats", "ink, sd", "agreement, points", "diversity %", "symmetry (held out)", "upper (held out)", "FD-pixels"]


def win_rate(workdir, teacher, seed: int) -> float:
    """Percent of fresh comparisons with the teacher that have more ink; the same noise and classes for both."""
    from flowjax.evals import image, protocol, rewards

    labels = protocol.labels(100 if TINY.value else 500, 10, "balanced", 200 + seed)
    drawn = [common.samples(d, labels, seed=200 + seed, steps=10, **digits.UNGUIDED) for d in (workdir, teacher)]
    ink = [rewards.reward("ink", image.quantise(x, sampled=True), labels) for x in drawn]
    return 100 * rewards.win_rate(*ink)


def main():
    runtime.setup()
    seeds, runs = range(common.SEEDS.value), "rewards_tiny" if TINY.value else "rewards"
    # Where results lie: an absolute path takes the place of the studies' own folder.
    out = (lambda name: str((pathlib.Path(common.RUNS.value) / runs / name).absolute())) if TINY.value else lambda name: name  # noqa: E731
    own = lambda s: common.train(f"{runs}/teacher/{s}", common.config("digits", "smoke", seed=s)) if TINY.value else digits.teacher(s)  # noqa: E731
    teachers = [own(s) for s in seeds]
    train = lambda name, s, of: common.train(f"{runs}/{name.replace(', ', '_').replace(' ', '-')}/{s}", of)  # noqa: E731
    dirs = {}
    for s, teacher in zip(seeds, teachers):
        for name, of in methods(s, teacher).items():
            dirs.setdefault(name, []).append(train(name, s, of))
    other = {name: train(name, 0, of) for name, of in variants(0, teachers[0]).items()}
    curves, more = {k: [curve(d) for d in v] for k, v in dirs.items()}, {k: curve(d) for k, d in other.items()}

    # --- the figures that were to be reached
    best = lambda c: within(c, BOUND)  # noqa: E731
    rows = [[name, *columns(c, best)] for name, c in curves.items()]
    ink = np.concatenate([[c["ink"][0], c["ink/sd"][0]] for cs in curves.values() for c in cs]).reshape(-1, 2).mean(0)
    passed = {name: [bool(c["gain"][best(c)] >= GAIN) for c in cs] for name, cs in curves.items()}
    rates = [win_rate(d, t, s) for s, d, t in zip(seeds, dirs["DPO"], teachers)]
    text = [
        "# Rewards", "",
        f"{common.measured_by('rewards')}. The digits teacher is asked for more ink, of",
        f"which its samples have {ink[0]:.3f}, with a standard deviation of {ink[1]:.3f} among samples: the unit of the gains. 400 unguided",
        "samples, Heun with 8 steps.",
        "KL: nats, of the trajectories of Flow-GRPO's SDE in 8 steps, of which the last has no noise, from the teacher's: an upper bound of that",
        "of the states before the last step. The samples are another sampler's; what a method changes in the last step alone does not count.", "",
        f"## The most ink at a KL of at most {BOUND:g} nats and class agreement at most {LOST:g} points lower", "",
        common.table(out("rewards"), ["method", *HEAD], rows), "",
        f"At least {GAIN:g} standard deviations: "
        + "; ".join(f"{name} {sum(v)} of {len(v)}" for name, v in passed.items()) + ".",
        f"DPO at its end, 500 fresh comparisons with its reference: win rate {common.spread(rates)} %.", "",
    ]  # fmt: skip
    # --- at equal divergence
    levels = (1.0, 2.0, 4.0, 8.0, 16.0)
    rows = [[name, *(common.spread([at(c, v) for c in cs]) for v in levels)] for name, cs in curves.items()]
    rows += [[f"{name} (one seed)", *(common.spread([at(c, v)]) for v in levels)] for name, c in more.items()]
    rows.append(["sqrt(2 KL)", *(f"{np.sqrt(2 * v):.3g}" for v in levels)])
    text += [
        "## Ink gained at equal KL", "",
        "In standard deviations, read between two measurements; nan where a run does not go so far. A reward that is Gaussian among the",
        "reference's samples cannot gain more than sqrt(2 KL) standard deviations (Donsker and Varadhan), KL being that of the samples",
        "themselves: here a line to compare with, and no bound, as what is measured is that of trajectories.", "",
        common.table(out("rewards_at"), ["method", *(f"at {v:g}" for v in levels)], rows), "", "![reward over KL](rewards_kl.png)", "",
    ]  # fmt: skip
    # --- what is lost
    rows = [[name, *columns(c)] for name, c in curves.items()] + [[f"{name} (one seed)", *columns([c])] for name, c in more.items()]
    text += [
        "## At the end of the runs", "",
        "Nothing holds `no KL` and `nothing held`: what a reward alone ends in is in their rows. `stopped` is the first of them with",
        f"`panel.stop = {{'kl': {{'above': {BOUND:g}}}}}`.", "",
        common.table(out("rewards_end"), ["run", *HEAD], rows), "",
        "![agreement over KL](rewards_agreement.png)", "![diversity over KL](rewards_diversity.png)", "",
    ]  # fmt: skip

    def draw(axes, name, unit, bound=False, scale=1.0):
        limit = 1.5 * BOUND
        for i, (label, found) in enumerate([*curves.items(), *((k, [c]) for k, c in more.items())]):
            style = {"color": f"C{i % 10}", "ls": "-" if label in curves else "--", "lw": 1.2}
            for j, c in enumerate(found):
                rows = slice(None, int(np.argmax(c["kl"] > limit)) or None)
                axes.plot(c["kl"][rows], scale * c[name][rows], label=None if j else label, **style)
        if bound:
            x = np.linspace(0, limit, 200)
            axes.plot(x, np.sqrt(2 * x), color="grey", lw=1, label="sqrt(2 KL)")
        axes.set(xlabel="KL to the teacher, nats", ylabel=unit, xlim=(0, limit))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    common.figure(out("rewards_kl"), lambda a: draw(a, "gain", "ink gained, standard deviations", True), (7.5, 4))
    common.figure(out("rewards_agreement"), lambda a: draw(a, "agreement", "class agreement, %", scale=100), (7.5, 3.4))
    common.figure(out("rewards_diversity"), lambda a: draw(a, "diversity", "diversity within classes"), (7.5, 3.4))
    pictures = {"reference": teachers[0], "grpo": dirs["Flow-GRPO"][0], "grpo_no_kl": other["Flow-GRPO, no KL"]}
    for name, workdir in pictures.items():
        common.picture(out(f"rewards_{name}"), workdir, **digits.UNGUIDED)
    text += ["Teacher, Flow-GRPO and Flow-GRPO without KL, the same noise:", ""] + [f"![{k}](rewards_{k}.png)" for k in pictures]
    common.page(out("rewards"), "\n".join(text))
