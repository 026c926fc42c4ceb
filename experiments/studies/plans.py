"""What pods would do: every config of paper scale compiled by XLA's TPU compiler, no TPU needed.

    python -m experiments.study plans        (in an environment with the extra `plan`; one to four minutes of one CPU a row)

Each row is one `python -m tools.plan`; its JSON is kept under <runs>/plans, delete a file to compile that row anew.
"""

import json
import pathlib

from experiments.studies import common

# name -> (config, topology, batch size, other flags)
PLANS = {
    "DiT-XL/2": ("imagenet_dit_xl2", "v5e:16x16", 4096, []),
    "DiT-XL/2, one image a chip": ("imagenet_dit_xl2", "v5e:16x16", 256, ["--config.mesh.tensor=4"]),
    "SiT-XL/2": ("imagenet_sit_xl2", "v5e:16x16", 4096, []),
    "DiT-XL/2, 512 px": ("imagenet_dit_xl2_512", "v5e:16x16", 1024, []),
    "SD3 2B, 1024 px": ("t2i_sd3_2b", "v5p:8x8x4", 1024, []),
    "SD3.5 8B, 1024 px": ("t2i_sd35_8b", "v5p:8x8x4", 1024, []),
    "FLUX.1 12B, 1024 px": ("t2i_flux_12b", "v5p:8x8x4", 1024, []),
    "DiT-XL/2 on v5p": ("imagenet_dit_xl2", "v5p:8x8x4", 4096, []),
    "DiT-XL/2 on v6e": ("imagenet_dit_xl2", "v6e:16x16", 4096, []),
}
# Weak scaling: 16 images a chip. Within a group of 16 chips the state is split, between groups it is repeated. On 16 chips the group
# is the whole slice, over which the compiler scatters nothing (tools.plan says so); groups of 8 do not fit.
WEAK = {
    "256": PLANS["DiT-XL/2"],
    "64": ("imagenet_dit_xl2", "v5e:8x8", 1024, []),
    "16": ("imagenet_dit_xl2", "v5e:4x4", 256, []),
}


def planned(config, topology, batch, flags) -> dict:
    """The JSON of one plan, compiled now where it is not there."""
    name = "_".join([config, topology, str(batch), *(flag.removeprefix("--config.") for flag in flags)])
    file = pathlib.Path(common.RUNS.value) / "plans" / f"{name.replace(':', '-')}.json"
    if not file.exists():
        common.binary(
            "tools.plan", f"--config=configs/{config}.py", f"--topology={topology}", f"--config.batch_size={batch}", "--nosampler",
            f"--out={file.absolute()}", *flags, codes=(0, 1),  # 1: it does not fit
        )  # fmt: skip
    return json.loads(file.read_text())


def row(name, topology, found) -> list:
    """One line of the table."""
    p = found["step"]
    head = [name, topology, p["batch"], " x ".join(f"{k} {v}" for k, v in p["mesh"].items() if v > 1), found["config"]["model"].get("remat", "none")]
    if not p["fits"]:
        return [*head, "does not fit", *[""] * (len(HEAD) - len(head) - 1)]
    seconds = p["roofline"]["seconds"]
    return [
        *head, f"{p['memory']['total'] / 2**30:.1f} of {p['memory']['limit'] / 2**30:.1f}", f"{p['flops']['ratio']:.2f}",
        " / ".join(f"{1e3 * seconds[k]:.1f}" for k in ("compute", "memory", "network")), p["roofline"]["bound by"],
        f"{100 * p['roofline']['mfu at most']:.0f} %", f"{100 * p['roofline']['mfu if nothing overlaps']:.0f} %", whole(p),
        f"{p['compile_cpu_seconds']:.0f} s",
    ]  # fmt: skip


HEAD = ["", "topology", "batch", "mesh", "remat", "GiB a device", "operations executed / needed", "compute / memory / network, ms",
        "bound by", "MFU at most", "MFU if nothing overlaps", "all-reduced whole", "compile, CPU"]  # fmt: skip


def whole(p) -> str:
    """What fsdp splits and is all-reduced whole."""
    found = {name.removeprefix("net/").removesuffix("/kernel"): v for name, v in p["reduced whole"].items()}
    return f"{', '.join(found)}: {sum(found.values()) / 2**20:.0f} MiB" if found else "nothing"


def sent(found, kind=None) -> float:
    """MiB that one device sends in a step, by one kind of collective or all."""
    return sum(v["bytes sent"] for k, v in found["step"]["collectives"].items() if kind in (None, k)) / 2**20


def write(plans: dict, weak: dict):
    """The page of the plans that are there."""
    rows = [row(name, PLANS[name][1], plans[name]) for name in PLANS if name in plans]
    weak = {name: weak[name] for name in reversed(WEAK) if name in weak and weak[name]["step"]["fits"]}
    kinds = sorted({k for found in weak.values() for k in found["step"]["collectives"]})
    scaling = [[name, WEAK[name][2], *(f"{sent(found, k):.0f}" for k in kinds), f"{sent(found):.0f}", whole(found["step"])] for name, found in weak.items()]

    def draw(axes):
        bottom = [0.0] * len(weak)
        for kind in kinds:
            values = [sent(found, kind) for found in weak.values()]
            axes.bar([*weak], values, bottom=bottom, label=kind)
            bottom = [a + b for a, b in zip(bottom, values)]
        axes.set(xlabel="chips (v5e), 16 images each", ylabel="MiB sent by a device, a step", title="DiT-XL/2, state split over 16 chips")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))

    common.figure("plans_weak_scaling", draw)
    text = [
        "# Plans", "", "`python -m experiments.study plans`: train steps as XLA compiles them for the pod that is named; nothing was run.",
        "Times are rooflines: operations, bytes of memory traffic and bytes sent, each over the chip's published peak; the step takes at",
        "least the largest of the three. More operations than needed are recomputation, fewer are hidden in an attention kernel.", "",
        common.table("plans", HEAD, rows), "",
        "## Weak scaling", "",
        "DiT-XL/2 on v5e, 16 images a chip, products kept, the state split over 16 chips and repeated beyond: MiB that one device sends in a",
        "step. On 16 chips the group is a whole square slice, over which XLA's TPU compiler makes a whole all-reduce of every reduce-scatter", "and passes the other kernels round a ring, piece by piece, as it multiplies.", "",
        common.table("plans_weak_scaling", ["chips", "batch", *kinds, "all", "all-reduced whole"], scaling), "", "![](plans_weak_scaling.png)",
    ]  # fmt: skip
    common.page("plans", "\n".join(text))


def main():
    plans, weak = {}, {}
    for table, found in ((WEAK, weak), (PLANS, plans)):
        for name, arguments in table.items():
            found[name] = planned(*arguments)
            write(plans, weak)  # as far as it is: a study that is stopped leaves a page, and goes on where it was
    return 0
