"""Small studies with a published direction: prediction, time law, guidance scale, average length, sampler order.

    python -m experiments.studies.ablations            (after experiments.studies.digits, whose teachers it measures)
"""

import jax
import numpy as np

from experiments import shell
from experiments.studies import common, digits
from flowjax.train import runtime

SCALES = (1.0, 1.5, 2.0, 4.0, 8.0)
LENGTHS = ("params", "ema_10", "ema_50", "ema_150", "ema_400", "ema")
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "dpmpp_2m": 2}


def training(seeds):
    """Prediction and time law at 500 steps."""
    uniform = {"time": {"name": "uniform", "stratified": True}}
    variants = {
        "velocity, uniform t": {},
        "eps, uniform t": {"prediction": "eps"},
        "velocity, logit-normal(0, 1) t": {"objective": {"time": {"name": "logit_normal", "stratified": True}}},
    }
    rows = []
    for name, change in variants.items():
        slug = name.replace(", ", "-").replace(" ", "_").replace("(", "").replace(")", "")
        plain, guided = [], []
        for seed in seeds:
            settings = common.config("digits", seed=seed, steps=500, **({"objective": uniform} | change))
            settings["sample"]["every"] = 0
            workdir = common.train(f"ablations/{slug}/{seed}", settings)
            plain.append(common.measure(workdir, seed=seed, **digits.UNGUIDED))
            guided.append(common.measure(workdir, seed=seed, steps=5, **digits.UNGUIDED))
        rows.append([
            name, common.spread([common.frechet(r)["distance"] for r in plain]),
            common.spread([100 * r["agreement"]["agreement"] for r in plain]),
            common.spread([common.frechet(r)["distance"] for r in guided]),
        ])  # fmt: skip
    head = ["500 training steps", "FD-pixels, Heun 25", "class agreement %", "FD-pixels, Heun 5"]
    return common.table("training", head, rows)


def guidance(teachers):
    """FD and agreement over the guidance scale."""
    results = {w: [common.measure(d, seed=s, guidance=None if w == 1 else w) for s, d in enumerate(teachers)] for w in SCALES}
    rows = [
        [w, common.spread([common.frechet(r)["distance"] for r in rs]), common.spread([100 * r["agreement"]["agreement"] for r in rs])]
        for w, rs in results.items()
    ]

    def draw(axes):
        axes.plot(SCALES, [np.mean([common.frechet(r)["distance"] for r in results[w]]) for w in SCALES], "o-", label="FD-pixels")
        axes.set(xlabel="guidance scale", ylabel="FD-pixels to held-out", xscale="log", xticks=SCALES, xticklabels=SCALES)
        other = axes.twinx()
        other.plot(SCALES, [100 * np.mean([r["agreement"]["agreement"] for r in results[w]]) for w in SCALES], "s--", color="C1")
        other.set_ylabel("class agreement %", color="C1")

    common.figure("guidance", draw)
    return common.table("guidance", ["guidance scale", "FD-pixels", "class agreement %"], rows)


def averages(teachers):
    """FD over the length of the average, with and without guidance."""
    rows = []
    for name in LENGTHS:
        said = {"params": "none (last weights)", "ema": "693 (default)"}.get(name, name.removeprefix("ema_"))
        results = [common.measure(d, seed=s, weights=name, **digits.UNGUIDED) for s, d in enumerate(teachers)]
        distance = common.spread([common.frechet(r)["distance"] for r in results])
        rows.append([said, distance, common.spread([100 * r["agreement"]["agreement"] for r in results])])
    return common.table("averages", ["half-life asked for, steps (the warm-up caps it at 154 after 2,000 steps)", "FD-pixels, no guidance", "class agreement %"], rows)


def orders():
    """RMSE to the exact flow map of four Gaussians against the number of model calls, float64."""
    from flowjax import exact, paths, samplers, times

    counts = (4, 8, 16, 32, 64, 128)
    with jax.enable_x64(True):
        path, data = paths.rectified(), exact.mix4()
        model = data.model(path)
        z = jax.random.normal(jax.random.key(0), (256, 2), "float64")
        reference = samplers.sample(model, z, jax.random.key(1), times.grid(2000, path), "rk4")
        errors, calls = {}, {}
        for name in ORDERS:
            run = lambda x, at, name=name: samplers.sample(model, x, jax.random.key(1), at, name)  # noqa: E731
            ends = [jax.jit(run)(z, times.grid(n, path)) for n in counts]
            errors[name] = [float(np.sqrt(np.mean(np.square(np.asarray(e - reference))))) for e in ends]
            built = samplers.SAMPLERS[name]()
            calls[name] = [samplers.nfe(built, model, times.grid(n, path)) for n in counts]
    rows = []
    for name, order in ORDERS.items():
        slope = np.log2(errors[name][-2] / errors[name][-1])
        rows.append([name, order, f"{slope:.2f}", *(f"{e:.2e}" for e in errors[name])])

    def draw(axes):
        for name in ORDERS:
            axes.loglog(calls[name], errors[name], "o-", ms=3, label=name)
        axes.set(xlabel="model calls", ylabel="RMSE to the exact map")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)

    common.figure("orders", draw)
    return common.table("orders", ["sampler", "order", "observed at 64 -> 128", *(f"{n} steps" for n in counts)], rows)


def main():
    runtime.setup()
    seeds = range(common.SEEDS.value)
    teachers = [digits.teacher(s) for s in seeds]
    text = [
        "# Ablations", "",
        f"`python -m experiments.studies.ablations`: mean ± standard deviation over {len(seeds)} seeds, 1,000 samples each.",
    ]  # fmt: skip
    sections = {
        "Sampler order: four Gaussians, exact velocity, float64, uniform grid from t = 1 to 0": orders,
        "Guidance scale, Heun 25": lambda: guidance(teachers),
        "Length of the average, no guidance": lambda: averages(teachers),
        "Prediction and time law at equal steps, no guidance": lambda: training(seeds),
    }
    pictures = {0: "![error over model calls](orders.png)", 1: "![guidance](guidance.png)"}
    for i, (title, section) in enumerate(sections.items()):
        text += ["", f"## {title}", "", section()] + (["", pictures[i]] if i in pictures else [])
        common.page("ablations", "\n".join(text))  # after each section: the last one takes as long as all the others


if __name__ == "__main__":
    shell.run(main)
