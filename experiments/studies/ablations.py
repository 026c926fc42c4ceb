"""Small studies with a published direction: prediction, time law, guidance scale, average length, sampler order.

    python -m experiments.study ablations            (after experiments.study digits, whose teachers it measures)
"""

import jax
import numpy as np

from experiments.studies import common, digits
from flowjax.train import runtime

SCALES = (1.0, 1.25, 1.5, 2.0, 4.0, 8.0)
LENGTHS = (10, 30, 100, 300)
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "dpmpp_2m": 2}
VARIANTS = {
    "velocity, uniform t": {},
    "eps, uniform t": {"prediction": "eps"},
    "velocity, logit-normal(0, 1) t": {"objective": {"time": {"name": "logit_normal", "stratified": True}}},
}


def young(name, seed):
    """A run of 500 steps of one of VARIANTS."""
    uniform = {"objective": {"time": {"name": "uniform", "stratified": True}}}
    settings = common.config("digits", seed=seed, steps=500, **(uniform | VARIANTS[name]))
    settings["sample"]["every"] = 0
    slug = name.replace(", ", "-").replace(" ", "_").replace("(", "").replace(")", "")
    return common.train(f"ablations/{slug}/{seed}", settings)


def training(seeds):
    """Prediction and time law at 500 steps."""
    rows = []
    for name in VARIANTS:
        workdirs = [young(name, seed) for seed in seeds]
        fine = [common.measure(w, seed=s, **digits.UNGUIDED) for s, w in zip(seeds, workdirs)]
        coarse = [common.measure(w, seed=s, steps=5, **digits.UNGUIDED) for s, w in zip(seeds, workdirs)]
        rows.append([
            name, common.spread([common.frechet(r)["distance"] for r in fine]),
            common.spread([100 * r["agreement"]["agreement"] for r in fine]),
            common.spread([common.frechet(r)["distance"] for r in coarse]),
        ])  # fmt: skip
    head = ["500 training steps", "FD-pixels, Heun 25", "class agreement %", "FD-pixels, Heun 5"]
    return common.table("training", head, rows)


def guidance(teachers, beginners):
    """FD and agreement over the guidance scale: of the finished teachers and of the same networks after 500 steps."""
    results = {}
    for name, workdirs in (("2,000 steps", teachers), ("500 steps", beginners)):
        for w in SCALES:
            results[name, w] = [common.measure(d, seed=s, guidance=None if w == 1 else w) for s, d in enumerate(workdirs)]
    rows = [
        [name, w, common.spread([common.frechet(r)["distance"] for r in rs]), common.spread([100 * r["agreement"]["agreement"] for r in rs])]
        for (name, w), rs in results.items()
    ]

    def draw(axes):
        other = axes.twinx()
        for i, name in enumerate(dict.fromkeys(name for name, _ in results)):
            pick = lambda value: [np.mean([value(r) for r in results[name, w]]) for w in SCALES]  # noqa: B023, E731
            axes.plot(SCALES, pick(lambda r: common.frechet(r)["distance"]), "o-", color=f"C{i}", label=f"{name}: FD-pixels")
            other.plot(SCALES, pick(lambda r: 100 * r["agreement"]["agreement"]), "s:", color=f"C{i}")
        axes.set(xlabel="guidance scale", ylabel="FD-pixels to held-out", xscale="log", yscale="log", xticks=SCALES, xticklabels=SCALES)
        other.set_ylabel("class agreement % (dotted)")
        axes.legend(fontsize=8)

    common.figure("guidance", draw)
    return common.table("guidance", ["trained", "guidance scale", "FD-pixels", "class agreement %"], rows)


def averages(seeds):
    """FD over the length of the average at a CONSTANT learning rate: a schedule that ends at 0 averages by itself."""
    decays = {f"ema_{n}": {"name": "constant", "decay": round(0.5 ** (1 / n), 6)} for n in LENGTHS}
    workdirs = []
    for seed in seeds:
        optimizer = {"schedule": {"name": "constant", "rate": 1e-3, "warmup": 100}}
        settings = common.config("digits", seed=seed, steps=1000, optimizer=optimizer, ema=decays)
        settings["sample"]["every"] = 0
        workdirs.append(common.train(f"ablations/averages/{seed}", settings))
    rows = []
    for name in ("params", *decays):
        results = [common.measure(d, seed=s, weights=name, **digits.UNGUIDED) for s, d in enumerate(workdirs)]
        distance = common.spread([common.frechet(r)["distance"] for r in results])
        said = "none (last weights)" if name == "params" else name.removeprefix("ema_")
        rows.append([said, distance, common.spread([100 * r["agreement"]["agreement"] for r in results])])
    return common.table("averages", ["half-life, steps", "FD-pixels, no guidance", "class agreement %"], rows)


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
        f"{common.measured_by('ablations')}, 1,000 samples each.",
    ]  # fmt: skip
    sections = {
        "Sampler order: four Gaussians, exact velocity, float64, uniform grid from t = 1 to 0": orders,
        "Guidance scale, Heun 25": lambda: guidance(teachers, [young("velocity, uniform t", s) for s in seeds]),
        "Prediction and time law at equal steps, no guidance": lambda: training(seeds),
        "Length of the average: 1,000 steps at a constant rate, no guidance": lambda: averages(seeds),
    }
    pictures = {0: "![error over model calls](orders.png)", 1: "![guidance](guidance.png)"}
    for i, (title, section) in enumerate(sections.items()):
        text += ["", f"## {title}", "", section()] + (["", pictures[i]] if i in pictures else [])
        common.page("ablations", "\n".join(text))  # after each section: the last one takes as long as all the others
