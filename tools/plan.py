"""What a config would do on a machine that is not here: the real train step and sampler, compiled ahead of time.

    python -m tools.plan --config=configs/imagenet_dit_xl2.py --topology=v5e:16x16
    python -m tools.plan --config=configs/imagenet_dit_xl2.py --topology=v5e:16x16 --config.batch_size=4096 --config.mesh.fsdp=256
    python -m tools.plan --config=configs/imagenet_dit_xl2.py --topology=v5e:16x16 --search
    python -m tools.plan --config=configs/digits.py --topology=cpu:8

TPU topologies (v5e, v5p, v6e; v5e:4x4, v5p:4x4x4, ...) are compiled by XLA's TPU compiler, which needs the package libtpu
(the extra flowjax[plan]) and no TPU. Printed, and saved by --out as JSON: memory per device against the chip's, operations
against the analytic count, collectives by kind, and a roofline. Nothing is run: times are BOUNDS from vendor figures
(flowjax.train.hardware), not measurements.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import time

from absl import flags
from ml_collections import config_flags

from experiments import shell
from flowjax.config import ConfigError

TPUS = ("v5e", "v5p", "v6e")
EXAMPLES = "v5e:2x2, v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v6e:8x8, cpu:8"


def devices_of(topology: str, slices: int = 1):
    """(devices, Chip or None) of a topology's name."""
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0 and slices == 1:
        import jax

        with contextlib.suppress(RuntimeError):  # the backend runs already; it may have enough devices
            jax.config.update("jax_num_cpu_devices", int(shape))
        if len(jax.devices()) < int(shape):
            raise ConfigError(f"--topology={topology}: this process has {len(jax.devices())} CPU devices already")
        return jax.devices()[: int(shape)], None
    if kind not in TPUS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ConfigError(f"--topology={topology} (--slices={slices}) is unknown; valid are for example {EXAMPLES}")
    sides = [int(n) for n in shape.split("x")]  # libtpu describes slices that nobody builds
    if kind == "v5p" and len(sides) != 3:
        raise ConfigError(f"--topology={topology}: a slice of v5p has three sides, for example v5p:2x2x1, v5p:4x4x4, v5p:8x8x4")
    if kind != "v5p" and (len(sides) != 2 or max(sides) > 16):
        raise ConfigError(f"--topology={topology}: a slice of {kind} has two sides, at most 16x16; larger jobs are several (--slices)")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs needs the package libtpu: pip install 'flowjax[plan]' (best in an environment of its own)")
    # Without these libtpu looks for a TPU of this machine, complains that there is none, and refuses a second process.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_STDERR_LOG_LEVEL="3", TPU_MIN_LOG_LEVEL="3")
    for name, value in (("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_ACCELERATOR_TYPE", "v5litepod-4")):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    from flowjax.train import hardware

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **({"num_slices": slices} if slices > 1 else {}))
    except Exception as error:
        raise ConfigError(f"--topology={topology}: {str(error).splitlines()[0]}; valid are for example {EXAMPLES}") from None
    return described.devices, hardware.CHIPS[kind]


def assemble(config, devices):
    """A Run of a resolved config on those devices (None: those that are here); data that it promises are not looked for."""
    from flowjax.data.pipeline import declared
    from flowjax.train.assembly import Run

    section = config["data"]
    promised = not isinstance(section, str) and section.get("expect_shape")
    return Run(config, devices=devices, data=declared(section) if promised else None)


def plan(run, chip, what: str = "step", save_text: str = "") -> dict:
    """Compile the train step ("step") or the sampler ("sampler") of a Run and describe the program."""
    import jax

    from flowjax.models import flops
    from flowjax.train import hlo

    fn, arguments = _program(run, what)
    count = run.mesh.size
    out = {"mesh": dict(run.mesh.shape), "devices": count, "batch": run.config["batch_size"] if what == "step" else run.config["sample"]["count"]}
    start = time.time()
    lowered = fn.lower(*arguments)
    out["trace_seconds"], start, used = time.time() - start, time.time(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return out | {"fits": False, "refused": str(error).splitlines()[0], "memory": _given(run)}
    out["compile_seconds"], out["compile_cpu_seconds"] = time.time() - start, time.process_time() - used
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if save_text:
        pathlib.Path(save_text).write_text(text)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    out["memory"] = {
        **_given(run), "arguments and results": held, "temporaries": memory.temp_size_in_bytes, "total": total,
        "limit": chip.memory if chip else None,
    }  # fmt: skip
    out["fits"] = chip is None or total <= chip.memory
    exchanges = hlo.collectives(text, count)
    kinds = sorted({c.kind for c in exchanges})
    out["collectives"] = {
        kind: {"per step": sum(c.turns for c in exchanges if c.kind == kind), "bytes sent": sum(c.sent for c in exchanges if c.kind == kind)} for kind in kinds
    }
    out["largest"] = [
        {k: v for k, v in c._asdict().items() if k != "members"} | {"axes": _axes_of(c, run.mesh), "sent": c.sent}
        for c in sorted(exchanges, key=lambda c: -c.sent)[:5]
    ]  # fmt: skip
    if what == "step":
        out["unsplit"], out["reduced whole"] = unsplit(run), reduced_whole(run, exchanges)
    sent = sum(c.sent for c in exchanges)
    # What the model needs, once: a program that recomputes or repeats work on several devices executes more.
    needed, executed = flops.count(_program(run.plain(), what)[0], *arguments), hlo.flops(text) * count
    out["flops"] = {"needed": needed, "executed": executed, "ratio": executed / needed}
    if chip:
        # At least this much goes through memory: what a step is given, gives back, and keeps in between (written and read).
        traffic = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
        # What a kernel does is not in the program's text: no program executes less than is needed.
        seconds = {"compute": max(executed, needed) / count / chip.flops, "memory": traffic / chip.bandwidth, "network": sent / chip.ring}
        step, ideal = max(seconds.values()), needed / count / chip.flops
        out["roofline"] = {
            "seconds": seconds, "step": step, "bound by": max(seconds, key=seconds.get), "mfu at most": ideal / step,
            "mfu if nothing overlaps": ideal / sum(seconds.values()),
        }  # fmt: skip
    return out


def unsplit(run) -> dict:
    """Kernels of the trained networks that fsdp does not split, because it divides none of their dimensions that a rule splits: they lie
    whole on each of its devices. "parameters": all that are not split, biases and norms too."""
    rows = [(name, leaf) for name, leaf in _parameters(run) if run.mesh.shape["fsdp"] > 1 and "fsdp" not in _split(leaf)]
    total = sum(leaf.size for _, leaf in _parameters(run))
    large = {name: list(leaf.shape) for name, leaf in rows if name.endswith(("kernel", "embedding")) and leaf.size > 1e-3 * total}
    return {"parameters": sum(leaf.size for _, leaf in rows), "of": total, "kernels": large}


def reduced_whole(run, exchanges) -> dict[str, float]:
    """Kernels of some size that fsdp splits and that are all-reduced over it all the same, where each device needs (or has) a part:
    name -> bytes of the whole kernel a step."""
    found, total = {}, sum(leaf.size for _, leaf in _parameters(run))
    for c in exchanges:
        if c.kind != "all-reduce" or run.mesh.shape["fsdp"] == 1 or "fsdp" not in _axes_of(c, run.mesh):
            continue
        for name, leaf in _parameters(run):
            module = name.partition("/")[2].rpartition("/")[0]  # of "net/blocks/adaln/kernel"
            least = 2 * leaf.size / math.prod(run.mesh.shape[a] for a in _split(leaf) if a != "fsdp")
            if leaf.ndim > 1 and leaf.size > 1e-3 * total and "fsdp" in _split(leaf) and f"/{module}/" in c.where and c.bytes * c.turns >= least:
                found[name] = found.get(name, 0) + c.bytes * c.turns
    return found


def _parameters(run) -> list:
    """(name, leaf) of all trained parameters, "net/blocks/adaln/kernel"."""
    from flowjax.train import checkpoint
    import jax

    return list(zip(checkpoint.names_of(run.target.params), jax.tree.leaves(run.target.params), strict=True))


def _split(leaf) -> set[str]:
    """Mesh axes that split a parameter."""
    return {axis for entry in leaf.sharding.spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}


def _axes_of(exchange, mesh) -> list[str]:
    """The mesh axes that an exchange goes over."""
    import numpy as np

    places = np.unravel_index(np.array(exchange.members, int), tuple(mesh.shape.values()))
    return [axis for axis, where in zip(mesh.shape, places) if len({*where.tolist()}) > 1]


def _given(run) -> dict[str, int]:
    """Bytes a device of what is trained, and of what is frozen beside it."""
    from flowjax.train import card

    return {"state": card.bytes_per_device(run.target), "frozen": card.bytes_per_device(run.frozen)}


def _program(run, what):
    """(jitted function, its arguments): the train step, or the sampler with which the run draws its pictures."""
    import jax
    import jax.numpy as jnp

    from flowjax import conditions

    if what == "step":
        return run.step(), (run.target, run.frozen, run.batch())
    section = run.config["sample"]
    everywhere = jax.NamedSharding(run.mesh, jax.P())
    seen = lambda v: jax.ShapeDtypeStruct((section["count"], *v.shape[1:]), v.dtype, sharding=everywhere)  # noqa: E731
    rows = seen(jnp.zeros((1,), jnp.int32))
    cond = jax.tree.map(seen, conditions.zeros(run.pipeline.conditions, 1))
    return run.sampler(section), (run.drawing(run.network), section["seed"], rows, cond)


def advice(found: dict, config, chip) -> list[str]:
    """What to change where a plan does not fit, or is far from bound by its arithmetic."""
    mesh, lines = found["mesh"], []
    if not found["fits"]:
        state = found["memory"]["state"]
        if chip and (frozen := found["memory"].get("frozen", 0)) > chip.memory / 4:
            lines.append(
                f"frozen networks take {_gib(frozen)} a device: split them further (config.mesh.fsdp, now {mesh['fsdp']}, or tensor), or let "
                "tools.encode_latents do their work once"
            )
        if chip and state > chip.memory / 2:
            lines.append(f"the state alone takes {_gib(state)} a device: split it further (config.mesh.fsdp, now {mesh['fsdp']}, or tensor)")
        if config["model"].get("remat", "full") != "full":
            lines.append("recompute more in the backward pass: config.model.remat = dots, attention or full")
        rows = config["batch_size"] // (mesh["data"] * mesh["fsdp"])
        if rows > 1:
            lines.append(f"a device holds {rows} examples: config.accumulate up to {rows}, or a smaller config.batch_size")
        elif mesh["context"] == 1:
            lines.append("a device holds one example: split its tokens (config.mesh.context) or its features (config.mesh.tensor)")
    elif found.get("roofline", {}).get("bound by") == "network":
        lines.append("the network is the bound: more examples a device (config.batch_size), less fsdp where memory allows, or --search")
    elif found.get("roofline", {}).get("bound by") == "memory":
        lines.append("memory traffic is the bound: more examples a device, or less kept between passes")
    smaller = [n for n in range(2, mesh["fsdp"]) if mesh["fsdp"] % n == 0]
    if kernels := found.get("unsplit", {}).get("kernels"):
        able = [n for n in smaller if all(any(size % n == 0 for size in shape[-2:]) for shape in kernels.values())]
        lines.append(f"config.mesh.fsdp = {mesh['fsdp']} does not divide every kernel; of its divisors {', '.join(map(str, able)) or 'only 1'} would")
    if chip and smaller and found.get("reduced whole") and mesh["fsdp"] == found.get("devices"):
        lines.append(
            "XLA's TPU compiler makes a whole all-reduce of a reduce-scatter over all chips of a 4x4, 8x8 or 4x4x4 slice, whoever writes it: with "
            f"config.mesh.fsdp = {smaller[-1]} or less, and data = -1, devices exchange only the parts that they keep"
        )
    return lines


def report(found: dict, what: str) -> str:
    """A plan as text."""
    mesh = " x ".join(f"{k} {v}" for k, v in found["mesh"].items() if v > 1) or "one device"
    lines = [f"{what}: batch {found['batch']} on {found['devices']} devices, {mesh}"]
    if "refused" in found:
        taken = f"{_gib(found['memory']['state'])}{_frozen(found['memory'])}"
        return "\n".join([*lines, f"  DOES NOT FIT: {found['refused']}", f"  of which the state takes {taken}"])
    memory, work = found["memory"], found["flops"]
    limit = f" of {_gib(memory['limit'])}" if memory["limit"] else ""
    lines += [
        f"  memory per device: {_gib(memory['total'])}{limit}{'' if found['fits'] else ': DOES NOT FIT'}"
        f" (arguments and results {_gib(memory['arguments and results'])}, temporaries {_gib(memory['temporaries'])}{_frozen(memory)})",
        f"  operations: {work['needed'] / 1e12:.4g} TFLOP needed (analytic), {work['executed'] / 1e12:.4g} executed, ratio {work['ratio']:.3f}",
        *(f"  {kind}: {v['per step']} a step, {v['bytes sent'] / 2**20:.4g} MiB sent by a device" for kind, v in found["collectives"].items()),
    ]
    if kernels := found.get("unsplit", {}).get("kernels"):
        names = "; ".join(f"{name} {tuple(shape)}" for name, shape in kernels.items())
        share = found["unsplit"]["parameters"] / found["unsplit"]["of"]
        lines.append(f"  whole on every device, {100 * share:.1f} % of the parameters: fsdp {found['mesh']['fsdp']} divides no dimension that a rule splits of {names}")
    if names := found.get("reduced whole"):
        lines.append(f"  all-reduced whole over fsdp, {_gib(sum(names.values()))} a step: {', '.join(names)}")
    if line := found.get("roofline"):
        times = ", ".join(f"{k} {1e3 * v:.3g} ms" for k, v in line["seconds"].items())
        lines += [
            f"  roofline: {times}; bound by {line['bound by']}: at least {1e3 * line['step']:.3g} ms",
            f"  model-FLOPs utilisation: at most {100 * line['mfu at most']:.1f} %, {100 * line['mfu if nothing overlaps']:.1f} % if nothing overlaps",
        ]
    return "\n".join([*lines, f"  traced in {found['trace_seconds']:.1f} s, compiled in {found['compile_seconds']:.1f} s ({found['compile_cpu_seconds']:.0f} s of one CPU)"])


def _frozen(memory) -> str:
    return f", frozen networks {_gib(memory['frozen'])}" if memory.get("frozen") else ""


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"


def search(config, devices, chip, fsdp=(), tensor=(1,), remat=("none",)) -> list[dict]:
    """Plans of every mesh asked for, each with the first remat policy that fits, best first; those that do not fit last."""
    count, found = len(devices), []
    root = max(n for n in range(1, count + 1) if count % n == 0 and n * n <= count)
    meshes = itertools.product(tensor, fsdp or sorted({1, root, count}))
    for across, split in meshes:
        for policy in remat if "remat" in _fields(config) else [None]:
            changed = {**config, "mesh": {"data": -1, "fsdp": split, "tensor": across, "context": config["mesh"].get("context", 1)}}
            if policy:
                changed["model"] = {**config["model"], "remat": policy}
            try:
                one = plan(assemble(changed, devices), chip)
            except ConfigError as error:
                print(f"fsdp {split}, tensor {across}: {error}", flush=True)
                break
            one["remat"] = policy
            found.append(one)
            print(f"remat {policy}, " + report(one, "step"), flush=True)
            if one["fits"]:
                break
    return sorted(found, key=lambda p: (not p["fits"], p.get("roofline", {}).get("step", 0)))


def _fields(config):
    from flowjax.models import MODELS

    return getattr(MODELS[config["model"]["name"]], "__dataclass_fields__", {})


def define():
    """The flags; not at import, so that the functions above can be used beside other binaries' flags."""
    config_flags.DEFINE_config_file("config", None, "configs/<name>.py[:arg]; --config.key=value overrides.", lock_config=True)
    flags.DEFINE_string("topology", None, "v5e:16x16, v5p:4x4x4, v6e:8x8, ... or cpu:<devices>.", required=True)
    flags.DEFINE_integer("slices", 1, "How many such TPU slices, joined by the data centre's network.", lower_bound=1)
    flags.DEFINE_string("out", "", "JSON file to write.")
    flags.DEFINE_string("hlo", "", "File for the compiled text of the train step.")
    flags.DEFINE_boolean("sampler", True, "Compile the sampler as well.")
    flags.DEFINE_boolean("search", False, "Try the meshes and remat policies below and rank those that fit.")
    flags.DEFINE_list("fsdp", [], "Sizes of mesh.fsdp to search; default: 1, the devices, and about their square root.")
    flags.DEFINE_list("tensor", ["1"], "Sizes of mesh.tensor to search.")
    flags.DEFINE_list("remat", ["none", "dots", "attention", "full"], "Policies of model.remat to search, least recomputation first.")
    flags.mark_flag_as_required("config")


def main():
    given = flags.FLAGS
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    devices, chip = devices_of(given.topology, given.slices)
    from flowjax.train import runtime, settings

    runtime.setup()
    if chip:  # a program compiled for a machine that is not here cannot be read back from a cache
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
    config = settings.resolve(given.config)
    out = {"topology": given.topology, "slices": given.slices, "config": config}
    if given.search:
        out["search"] = found = search(
            config, devices, chip, [int(n) for n in given.fsdp], [int(n) for n in given.tensor], given.remat
        )
        print("\nbest first:")
        for p in found:
            time_ = f"{1e3 * p['roofline']['step']:.3g} ms, bound by {p['roofline']['bound by']}" if "roofline" in p and p["fits"] else ""
            print(f"  {p['mesh']}, remat {p['remat']}: {time_ if p['fits'] else 'does not fit'}")
        fits = any(p["fits"] for p in found)
    else:
        run = assemble(config, devices)
        out["step"] = plan(run, chip, save_text=given.hlo)
        print(report(out["step"], "train step"))
        for line in advice(out["step"], config, chip):
            print(f"  -> {line}")
        if given.sampler and run.roles["net"].module.kind == "denoiser":
            out["sampler"] = plan(run, chip, "sampler")
            print(report(out["sampler"], "sampler"))
        fits = out["step"]["fits"]
    if given.out:
        path = pathlib.Path(given.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(out, indent=1))
    return 0 if fits else 1


if __name__ == "__main__":
    define()
    shell.run(main)
