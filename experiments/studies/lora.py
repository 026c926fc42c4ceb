"""What the rank of a LoRA buys: scikit-learn's digits go over to MNIST at 8x8, another hand and another scanner.

    python -m experiments.study lora --data=data/mnist      (made by tools.prepare_data; begins with the teacher of the digits study)
"""

import json

import numpy as np

from configs.digits_lora import KERNELS
from experiments.studies import common, digits
from flowjax.train import runtime

RANKS, RATES, STEPS = (4, 16, 64), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 400


def data() -> dict:
    return {"name": "array_record", "path": common.DATA.value or "data/mnist", "resize": 8}


def adapted(rank: int, rate: float, seed: int):
    """A finished run of configs/digits.py on the new images, from the digits teacher, by a LoRA of this rank or, 0, whole."""
    net = {"checkpoint": str(digits.teacher(0).absolute())}
    if rank:
        net["lora"] = {"pattern": KERNELS, "rank": rank, "alpha": float(rank), "dora": False}
    changes = {
        "data": data(), "roles": {"net": net}, "optimizer": {"schedule": {"name": "cosine", "rate": rate, "warmup": 50}},
        "ema": {"ema": {"name": "warmup", "decay": 0.98}}, "sample": {"every": 0}, "validation": {"every": 0},
    }  # fmt: skip
    return common.train(f"lora/rank_{rank}_rate_{rate:g}/{seed}", common.config("digits", seed=seed, steps=STEPS, **changes))


def quality(workdir, seed: int) -> tuple[float, float]:
    """(FD-pixels as a ratio to that of the training images, class agreement in percent)."""
    found = common.measure(workdir, seed=seed, guidance=None, metrics=("frechet", "agreement"), data=data())
    return common.frechet(found)["ratio"], 100 * found["agreement"]["agreement"]


def main():
    runtime.setup()
    seeds = range(common.SEEDS.value)
    rows = [["none, the base", "", "0", "", *(f"{v:.4g}" for v in quality(digits.teacher(0), 0))]]
    plotted = {}
    for rank in (*RANKS, 0):
        rate = min(RATES, key=lambda rate: quality(adapted(rank, rate, 0), 0)[0])
        runs = [adapted(rank, rate, seed) for seed in seeds]
        found = [quality(run, seed) for seed, run in zip(seeds, runs)]
        card = json.loads((runs[0] / "card.json").read_text())
        count, state = card["parameters"]["net"].split()[0], card["memory per device"]["state"]
        name = f"rank {rank}" if rank else "all weights"
        plotted[name] = (int(count.replace(",", "")), [distance for distance, _ in found])
        rows.append([name, f"{rate:g}", count, state, *(common.spread(v) for v in zip(*found))])
        print(rows[-1], flush=True)

    def draw(axes):
        for name, (trained, distances) in plotted.items():
            axes.errorbar(trained, np.mean(distances), np.std(distances), fmt="o", label=name, capsize=3)
        axes.set(xscale="log", xlim=(1e4, 1e6), xlabel="trained parameters", ylabel="FD-pixels, ratio")
        axes.legend()

    common.figure("lora", draw)
    head = ["trained", "rate", "trained parameters", "state in memory", "FD ratio", "class agreement %"]
    text = [
        "# Rank of a LoRA", "", f"{common.measured_by('lora')}, of the fine-tuning: all begin with one teacher, of",
        f"configs/digits.py, and see MNIST at 8x8 for {STEPS} steps of batch 128. The adapters are on attention and MLP. 1,000 samples, Heun 25, no",
        f"guidance; of the rates {', '.join(f'{r:g}' for r in RATES)} the best on the first seed. State: what is trained, its optimizer and its",
        "average in memory; an adapter has the frozen base, as large as all weights, beside it. FD ratio: Frechet distance of pixels to held-out",
        "images, divided by that of the training images; agreement: an SVM of the training images finds the asked class. At width 96 a rank of 64",
        "trains about as many parameters as its matrices have.", "",
        common.table("lora", head, rows), "", "![quality over trained parameters](lora.png)",
    ]  # fmt: skip
    common.page("lora", "\n".join(text))
    return 0
