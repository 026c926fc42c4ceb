"""What pods would do: every config of paper scale compiled by XLA's TPU compiler, no TPU needed.

    python -m experiments.study plans        (in an environment with the extra `plan`; about two minutes a row)

Each row is one `python -m tools.plan`; its JSON is kept under <runs>/plans, delete a file to compile that row anew.
"""

import json
import pathlib

from experiments.studies import common

# name -> (config, topology, batch size, other flags)
PLANS = {
    "DiT-XL/2": ("imagenet_dit_xl2", "v5e:16x16", 4096, ["--config.mesh.fsdp=16"]),
    "DiT-XL/2, one image a chip": ("imagenet_dit_xl2", "v5e:16x16", 256, ["--config.mesh.fsdp=16", "--config.mesh.tensor=4"]),
    "SiT-XL/2": ("imagenet_sit_xl2", "v5e:16x16", 4096, ["--config.mesh.fsdp=16"]),
    "DiT-XL/2, 512 px": ("imagenet_dit_xl2_512", "v5e:16x16", 1024, ["--config.mesh.fsdp=16"]),
    "DiT-XL/2 on v5p": ("imagenet_dit_xl2", "v5p:8x8x4", 4096, ["--config.mesh.fsdp=16"]),
    "DiT-XL/2 on v6e": ("imagenet_dit_xl2", "v6e:16x16", 4096, ["--config.mesh.fsdp=16"]),
    "SD3 2B, 1024 px": ("t2i_sd3_2b", "v5p:8x8x4", 1024, []),
    "SD3.5 8B, 1024 px": ("t2i_sd35_8b", "v5p:8x8x4", 1024, []),
    "FLUX.1 12B, 1024 px": ("t2i_flux_12b", "v5p:8x8x4", 512, []),
}
# Weak scaling: 16 images a chip. Within a group of 16 chips the state is split, between groups it is repeated.
WEAK = {chips: ("imagenet_dit_xl2", top, 16 * chips, ["--config.mesh.fsdp=16", "--config.model.remat=full"])
        for chips, top in ((16, "v5e:4x4"), (64, "v5e:8x8"), (256, "v5e:16x16"))}  # fmt: skip


def planned(name, config, topology, batch, flags) -> dict:
    """The JSON of one plan, compiled now where it is not there."""
    file = pathlib.Path(common.RUNS.value) / "plans" / f"{name}.json"
    if not file.exists():
        common.binary(
            "tools.plan", f"--config=configs/{config}.py", f"--topology={topology}", f"--config.batch_size={batch}", "--nosampler",
            f"--out={file.absolute()}", *flags, codes=(0, 1),  # 1: it does not fit
        )  # fmt: skip
    return json.loads(file.read_text())


def row(name, topology, found) -> list:
    """One line of the table."""
    p = found["step"]
    mesh = " x ".join(f"{k} {v}" for k, v in p["mesh"].items() if v > 1)
    head = [name, topology, p["batch"], mesh, found["config"]["model"].get("remat", "none")]
    if not p["fits"]:
        return [*head, "does not fit", *[""] * 5]
    gib = 2.0**30
    seconds = p["roofline"]["seconds"]
    return [
        *head, f"{p['memory']['total'] / gib:.1f} of {p['memory']['limit'] / gib:.1f}", f"{p['flops']['ratio']:.2f}",
        " / ".join(f"{1e3 * seconds[k]:.1f}" for k in ("compute", "memory", "network")), p["roofline"]["bound by"],
        f"{100 * p['roofline']['mfu at most']:.0f} %", f"{p['compile_seconds']:.0f} s",
    ]  # fmt: skip


def sent(found, kind=None) -> float:
    """MiB that one device sends in a step, by one kind of collective or all."""
    return sum(v["bytes sent"] for k, v in found["step"]["collectives"].items() if kind in (None, k)) / 2**20


def main():
    rows = [row(name, p[1], planned(name.replace("/", "-").replace(" ", "_"), *p)) for name, p in PLANS.items()]
    weak = {chips: planned(f"weak_{chips}", *p) for chips, p in WEAK.items()}
    kinds = sorted({k for found in weak.values() for k in found["step"]["collectives"]})
    scaling = [[chips, WEAK[chips][2], *(f"{sent(found, k):.0f}" for k in kinds), f"{sent(found):.0f}"] for chips, found in weak.items()]

    def draw(axes):
        bottom = [0.0] * len(weak)
        for kind in kinds:
            values = [sent(found, kind) for found in weak.values()]
            axes.bar([str(c) for c in weak], values, bottom=bottom, label=kind)
            bottom = [a + b for a, b in zip(bottom, values)]
        axes.set(xlabel="chips", ylabel="MiB sent by a device, a step")
        axes.legend(fontsize=7)

    common.figure("plans_weak_scaling", draw)
    head = ["", "topology", "batch", "mesh", "remat", "GiB a device", "operations executed / needed",
            "compute / memory / network, ms", "bound by", "MFU at most", "compile"]  # fmt: skip
    text = [
        "# Plans", "", "`python -m experiments.study plans`: train steps as XLA compiles them for the pod that is named; nothing was run.",
        "Times are rooflines: operations, bytes of memory traffic and bytes sent, each over the chip's published peak; the step takes at",
        "least the largest of the three. More operations than needed are recomputation, fewer are hidden in an attention kernel.", "",
        common.table("plans", head, rows), "",
        "## Weak scaling", "",
        "DiT-XL/2, 16 images a chip, full recomputation, v5e, state split over 16 chips and repeated beyond: MiB sent by one device a step.", "",
        common.table("plans_weak_scaling", ["chips", "batch", *kinds, "all"], scaling), "", "![](plans_weak_scaling.png)",
    ]  # fmt: skip
    common.page("plans", "\n".join(text))
    return 0
