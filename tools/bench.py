"""Speed of a config on the device at hand: python -m tools.bench --config=configs/digits.py [--config.batch_size=64 ...]

Assembles the run as training does, without a workdir, and times its real jitted train step on batches of its real pipeline:
steps/s, images/s, tokens/s per chip, model-TFLOP/s, utilisation, memory, waiting for data, compile time.

    --synthetic                                  one fixed batch instead of the pipeline: compute without data, which need not
                                                 be there if the config promises what they are (data.expect_shape)
    --feed                                       the pipeline alone: images/s that it can deliver, whoever computes
    --sampling --samplers=heun,euler --steps=10,25   drawing samples instead of training, by sampler and steps
    --sampling --price=2.5                       what a megapixel costs, where the devices together cost so much an hour
    --vs=torch                                   the same model in plain PyTorch in turn, A B A B ..., and the ratio of the two
    --json=FILE                                  everything, with device, versions and config

On a GPU, python -m tools.bench --config=CONFIG --config.model.dtype=bfloat16 --vs=torch runs our step against PyTorch with
torch.compile, bfloat16 autocast and scaled_dot_product_attention; both keep their state and activations on the one GPU, so
the batch must leave room for two. On a CPU both use float32 and as many threads as the process may use (taskset limits them).

The two sides share one process. A round is --repeats steps of ours, then as many of theirs, on one fixed batch; the first
step after each change of sides is not timed, because a thread pool spins for some milliseconds after its last work before it
sleeps. The ratio is theirs / ours of the median times over the rounds: above 1 we are faster. Its spread is the smallest and
the largest ratio of one round.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time

import jax
import numpy as np
from absl import flags

from experiments import shell
from flowjax import conditions, generate, storage, times
from flowjax.config import ConfigError, keywords, split
from flowjax.data.pipeline import pipeline
from flowjax.models import flops
from flowjax.train import card, runtime, settings
from flowjax.train import mesh as mesh_lib
from flowjax.train.assembly import Run
from tools.plan import assemble


# --- what is measured


def compiled(fn, *args):
    """(executable, {"trace", "compile": seconds, "cached": whether the persistent compile cache had it})."""
    hits = []
    listen = lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None  # noqa: E731
    start = time.perf_counter()
    lowered = fn.lower(*args)
    traced = time.perf_counter()
    jax.monitoring.register_event_listener(listen)
    try:
        executable = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return executable, {"trace": traced - start, "compile": time.perf_counter() - traced, "cached": bool(hits)}


def tokens_of(this) -> int | None:
    """Tokens of one example, or None for a network without."""
    patch, shape = getattr(this.roles["net"].module, "patch", None), this.example[0].shape[1:-1]
    return math.prod(n // patch for n in shape) if patch else None


def rates(seconds: float, work: int, images: int, tokens: int | None) -> dict:
    """Throughput where `seconds` do `work` FLOP on so many images of so many tokens."""
    peak, count = card.peak_flops(), jax.device_count()
    return {
        "images_per_second": images / seconds,
        "tokens_per_second_per_chip": images * tokens / seconds / count if tokens else None,
        "flops": work,
        "model_tflops": work / seconds / 1e12 if work else None,
        "mfu": work / seconds / (peak * count) if peak and work else None,
    }


def memory_of(executable) -> dict:
    """Bytes per device: what the compiler planned for one call, and the most that was in use where the backend counts it."""
    plan, stats = executable.memory_analysis(), jax.local_devices()[0].memory_stats()
    planned = plan and plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return {
        "arguments": plan and plan.argument_size_in_bytes,
        "temporaries": plan and plan.temp_size_in_bytes,
        "planned": planned,
        "most_in_use": stats and stats.get("peak_bytes_in_use"),
    }


def assembled(config) -> Run:
    """A Run on its data or, where these are not here, on what the config promises that they are."""
    config = settings.resolve(config)
    section = config["data"]
    here = isinstance(section, str) or storage.path(section.get("path", ".")).exists()
    return Run(config) if here else assemble(config, None)


def invented(this) -> dict:
    """A batch of the kind that a run's data are promised to have: normal numbers, labels of all classes, zeros for the rest."""
    draws, batch = np.random.default_rng(0), jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), this.batch())
    batch = {k: draws.standard_normal(v.shape, np.float32).astype(v.dtype) if k != "cond" and v.dtype != bool else v for k, v in batch.items()}
    if "label" in batch["cond"]:
        batch["cond"]["label"] = draws.integers(0, this.pipeline.num_classes, batch["cond"]["label"].shape, np.int32)
    return batch


class Steps:
    """Our side of training: Steps(run)(count) trains on, count steps; `spent` is what compiling took."""

    def __init__(self, this, synthetic: bool):
        if len(this.pipeline.shapes) > 1:
            raise ConfigError("data in buckets have a program for each size; measure one: data.name = 'array_record' with data.size = (height, width)")
        self.this = this
        stream = iter([invented(this)]) if this.pipeline.manifest.get("declared") else this.pipeline
        self.batches = (mesh_lib.place(batch, this.mesh) for batch in stream)
        self.first = next(self.batches)
        if synthetic:
            self.batches = itertools.repeat(self.first)
        self.step, self.spent = compiled(this.step(), this.target, this.frozen, self.first)
        self.state = this.fresh()

    def __call__(self, count: int):
        """(seconds of each step, seconds until each batch was there); like the training loop, a step ahead of the device."""
        ends, waits, pending = [time.perf_counter()], [], None
        for _ in range(count):
            asked = time.perf_counter()
            batch = next(self.batches)
            waits.append(time.perf_counter() - asked)
            self.state, metrics = self.step(self.state, self.this.frozen, batch)
            if pending:
                jax.device_get(pending)
                ends.append(time.perf_counter())
            pending = metrics
        jax.device_get(pending)
        return np.diff([*ends, time.perf_counter()]), np.array(waits)

    def work(self) -> int:
        """Model FLOPs of one step."""
        return flops.count(self.this.plain().step(), self.this.target, self.this.frozen, self.first)


class Draws:
    """Our side of sampling: Draws(run, sampler, steps, batch)(count) draws `batch` samples so many times."""

    def __init__(self, this, sampler, steps: int, batch: int):
        section = {**this.config["sample"], "sampler": sampler, "steps": steps}
        classes = this.pipeline.num_classes if getattr(this.roles["net"].module, "num_classes", 0) else 0
        cond = {k: v for k, v in conditions.zeros(this.pipeline.conditions, batch).items() if k != "label"}
        cond |= {"label": generate.balanced_labels(batch, classes)} if classes else {}
        self.inputs = this.config["seed"], np.arange(batch), cond
        self.this, self.section = this, section
        self.sample, self.spent = compiled(this.sampler(section), this.drawing(this.network), *self.inputs)
        self.params = this.whole("net", this.fresh().params["net"])

    def __call__(self, count: int):
        """Seconds of each call."""
        ends = [time.perf_counter()]
        for _ in range(count):
            jax.block_until_ready(self.sample(self.this.drawing(self.params), *self.inputs))
            ends.append(time.perf_counter())
        return np.diff(ends)

    def work(self) -> int | None:
        """Model FLOPs of one call; None where the number of model calls is decided while sampling."""
        try:
            return flops.count(self.this.plain().sampler(self.section), self.this.drawing(self.params), *self.inputs)
        except ValueError:
            return None


def train(config, warmup: int = 3, repeats: int = 20, synthetic: bool = False) -> dict:
    """What training of a config costs; seconds, bytes and counts by name."""
    this = assembled(config) if synthetic else Run(config)
    steps = Steps(this, synthetic)
    steps(max(1, warmup))
    seconds, waits = steps(repeats)
    middle = float(np.median(seconds))
    return {
        "network": this.config["model"], "parameters": card.size(this.network), "batch": this.config["batch_size"],
        "tokens": tokens_of(this), "warmup": warmup, "repeats": repeats, "synthetic": synthetic,
        "step_seconds": {"median": middle, "min": float(seconds.min()), "all": seconds.tolist()},
        "steps_per_second": 1 / middle,
        **rates(middle, steps.work(), this.config["batch_size"], tokens_of(this)),
        "data_wait": float(waits.sum() / seconds.sum()),
        "memory": memory_of(steps.step),
        "seconds_to": steps.spent,
    }  # fmt: skip


def dollars_per_megapixel(price: float, seconds: float, images: int, shape) -> float:
    """What a million pixels cost where `seconds` of a machine at `price` an hour make so many images of (height, width, channels)."""
    return price / 3600 * seconds / (images * math.prod(shape[:2]) / 1e6)


def sample(config, samplers=(), steps=(), batch: int = 0, warmup: int = 1, repeats: int = 5, price: float = 0.0) -> list[dict]:
    """What sampling costs, a row for each sampler and number of steps; what is not given comes from the config's sample section."""
    this, rows = assembled(config), []
    batch = batch or this.config["evaluate"]["batch"]
    for sampler, n in itertools.product(samplers or [this.config["sample"]["sampler"]], steps or [this.config["sample"]["steps"]]):
        draws = Draws(this, sampler, n, batch)
        draws(max(1, warmup))
        seconds = draws(repeats)
        middle = float(np.median(seconds))
        rows.append({
            "sampler": sampler, "steps": n, "guidance": this.config["sample"]["guidance"], "batch": batch,
            "call_seconds": {"median": middle, "min": float(seconds.min()), "all": seconds.tolist()},
            **rates(middle, draws.work(), batch, tokens_of(this)),
            "memory": memory_of(draws.sample),
            "seconds_to": draws.spent,
        } | ({"dollars_per_megapixel": dollars_per_megapixel(price, middle, batch, this.image_shape()), "shape": [*this.image_shape()]} if price else {}))  # fmt: skip
    return rows


def feed(config, warmup: int = 3, repeats: int = 20) -> dict:
    """What the pipeline of a config delivers with nobody computing; it has all the CPU's cores."""
    config = settings.resolve(config)
    batch = config["batch_size"]
    stream = pipeline(config["data"], batch, config["seed"])
    # Taken without a pause, batches are never ready ahead of time: as many are read as are taken.
    for _ in range(max(1, warmup)):
        first = next(stream)
    start = time.perf_counter()
    for _ in range(repeats):
        next(stream)
    seconds = time.perf_counter() - start
    size = sum(v.nbytes for v in jax.tree.leaves(first))
    return {
        "batch": batch, "repeats": repeats, "seconds": seconds, "images_per_second": batch * repeats / seconds,
        "images_per_second_per_core": batch * repeats / seconds / threads(), "bytes_per_second": size * repeats / seconds,
    }  # fmt: skip


# --- against PyTorch


def threads() -> int:
    """CPU threads that XLA uses: as many as the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def reference(asked: str = "--vs=torch"):
    """The module tools.torch_reference with as many threads as we have; ConfigError where PyTorch or a fair setting is missing."""
    try:
        import torch
    except ImportError:
        raise ConfigError(f"{asked} needs PyTorch, which is not installed; the extra `oracle` has it: pip install -e .[oracle]") from None
    from tools import torch_reference

    if jax.device_count() > 1:
        raise ConfigError(f"{asked} compares on one device, and there are {jax.device_count()}")
    if (jax.default_backend() == "gpu") != torch.cuda.is_available():
        here, there = jax.default_backend(), "gpu" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"{asked}: jax runs on the {here} and torch on the {there}; install the same kind of both")
    torch.set_num_threads(threads())
    return torch_reference


def in_turn(ours, theirs, rounds: int, repeats: int) -> dict:
    """Time ours(n) and theirs(n), which run n steps and return when they are done, in turn; see the module for the rules."""
    seconds = {"ours": [], "torch": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("torch", theirs)):
            run(1)
            start = time.perf_counter()
            run(repeats)
            seconds[name].append((time.perf_counter() - start) / repeats)
    each = [b / a for a, b in zip(*seconds.values())]
    middle = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "seconds": middle, "ratio": middle["torch"] / middle["ours"], "ratio_min": min(each), "ratio_max": max(each),
        "rounds": rounds, "repeats": repeats, "threads": threads(), "all": seconds,
    }  # fmt: skip


def train_vs_torch(config, warmup: int = 3, repeats: int = 5, rounds: int = 7) -> dict:
    """Our train step against PyTorch's, from the same weights on the same batch."""
    torch = reference()
    this = assembled(config)
    module = this.roles["net"].module
    torch.check_train(this.config, module)
    steps = Steps(this, synthetic=True)
    n = np.arange(warmup + rounds * (repeats + 1), dtype=np.float32)
    learning = np.asarray(this.schedules["net"](n)).tolist()
    decays = [[float(decay(i + 1)) for i in n] for decay, _ in this.averages.values()]
    net = torch.build(module, this.example[0].shape[1:], steps.state.params["net"])
    trainer = torch.Trainer(net, this.config, module, learning, decays)
    label = steps.first["cond"].get("label") if getattr(module, "num_classes", 0) else None
    batch = torch.place(steps.first["x"], label)

    def theirs(count):
        for _ in range(count):
            trainer.step(batch)
        torch.synchronise()

    steps(max(1, warmup)), theirs(max(1, warmup))
    out = {"batch": this.config["batch_size"], "parameters": card.size(steps.state.params["net"])}
    return out | in_turn(steps, theirs, rounds, repeats)


def sample_vs_torch(config, samplers=(), steps=(), batch: int = 0, warmup: int = 1, repeats: int = 1, rounds: int = 7) -> list[dict]:
    """Our samplers against PyTorch's loop, a row for each sampler and number of steps."""
    torch = reference()
    this, rows = assembled(config), []
    role, section, shape = this.roles["net"], this.config["sample"], this.example[0].shape[1:]
    batch = batch or this.config["evaluate"]["batch"]
    for sampler, n in itertools.product(samplers or [section["sampler"]], steps or [section["steps"]]):
        torch.check_sample(this.config, role.module, sampler)
        draws = Draws(this, sampler, n, batch)
        grid = times.grid(n, role.path, prediction=role.prediction, **keywords(section["grid"]))
        scale = split(section["guidance"], "sample.guidance")[1].get("scale")
        loop = torch.Sampler(torch.build(role.module, shape, draws.params), role.module, sampler, grid.tolist(), scale)
        x, label = torch.place(np.random.default_rng(0).standard_normal((batch, *shape), np.float32), draws.inputs[2].get("label"))

        def theirs(count, loop=loop, x=x, label=label):
            for _ in range(count):
                loop(x, label)
            torch.synchronise()

        draws(max(1, warmup)), theirs(max(1, warmup))
        row = {"sampler": sampler, "steps": n, "guidance": section["guidance"], "batch": batch}
        rows.append(row | in_turn(draws, theirs, rounds, repeats))
    return rows


# --- what is said


def machine() -> dict:
    """Device and versions."""
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = jax.devices()[0]
    return {
        "device": {
            "kind": device.device_kind, "platform": device.platform, "count": jax.device_count(),
            "processes": jax.process_count(), "cpu_threads": threads(),
        },
        "versions": versions,
    }  # fmt: skip


def _number(value, unit="", scale=1.0, digits=4) -> str:
    return "unknown" if value is None else f"{value * scale:,.{digits}g}{unit}"


def _bytes(count) -> str:
    return "unknown" if count is None else card.human(count, "B")


def _compiling(spent) -> str:
    return f"{spent['compile']:.3g} s{' (from the compile cache)' if spent['cached'] else ''}, after {spent['trace']:.3g} s of tracing"


def table_of_training(out) -> list[tuple[str, str]]:
    """(what, value) lines."""
    step, memory = out["step_seconds"], out["memory"]
    return [
        ("parameters", f"{out['parameters']:,}"),
        ("batch", f"{out['batch']} examples" + (f" of {out['tokens']} tokens" if out["tokens"] else "")),
        ("data", "one fixed batch" if out["synthetic"] else "the pipeline"),
        ("step", f"{1e3 * step['median']:.4g} ms median, {1e3 * step['min']:.4g} ms least, of {out['repeats']} after {out['warmup']}"),
        ("steps/s", _number(out["steps_per_second"])),
        ("images/s", _number(out["images_per_second"], digits=6)),
        ("tokens/s/chip", _number(out["tokens_per_second_per_chip"], digits=6) if out["tokens"] else "no tokens"),
        ("model TFLOP/s", f"{_number(out['model_tflops'])} ({card.human(out['flops'], 'FLOP')} a step, counted over the real step)"),
        ("MFU", _number(out["mfu"], " %", 100) if card.peak_flops() else f"unknown: no peak is known of {jax.devices()[0].device_kind!r}"),
        ("waiting for data", _number(out["data_wait"], " % of the time", 100, 3)),
        ("memory per device", f"{_bytes(memory['planned'])} planned, of which {_bytes(memory['temporaries'])} temporaries"),
        ("most memory in use", _bytes(memory["most_in_use"])),
        ("compile", _compiling(out["seconds_to"])),
    ]


def _columns(rows: list[dict[str, str]]) -> list[str]:
    """Aligned columns with a heading."""
    widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in rows[0]}
    lines = [{k: k for k in widths}, *rows]
    return ["  ".join(row[k].rjust(widths[k]) for k in widths) for row in lines]


def _sampler(row) -> dict[str, str]:
    name, settings = split(row["sampler"], "sampler")
    guide, options = split(row["guidance"], "guidance")
    return {
        "sampler": name + (f" {settings}" if settings else ""), "steps": str(row["steps"]), "batch": str(row["batch"]),
        "guidance": " ".join(map(str, (guide, *options.values()))),
    }  # fmt: skip


def table_of_sampling(rows) -> list[str]:
    """Lines."""
    return _columns([
        _sampler(row) | {
            "images/s": _number(row["images_per_second"]),
            "ms/call": _number(row["call_seconds"]["median"], scale=1e3),
            "least": _number(row["call_seconds"]["min"], scale=1e3),
            "TFLOP/s": _number(row["model_tflops"]),
            "MFU": _number(row["mfu"], " %", 100),
            "planned": _bytes(row["memory"]["planned"]),
            "in use": _bytes(row["memory"]["most_in_use"]),
            "compile": _number(row["seconds_to"]["compile"], " s", digits=3) + "*" * row["seconds_to"]["cached"],
        } | ({"$/megapixel": _number(row["dollars_per_megapixel"], digits=3)} if "dollars_per_megapixel" in row else {})
        for row in rows
    ]) + (["* from the compile cache"] if any(row["seconds_to"]["cached"] for row in rows) else []) + [
        f"$/megapixel counts the pixels of what is drawn, {' x '.join(map(str, shape))}: of latents, if no autoencoder takes part"
        for shape in [rows[0].get("shape")] if shape
    ]  # fmt: skip


def table_vs_torch(rows) -> list[str]:
    """Lines; above 1 we are faster."""
    said = {"training": {}} if "sampler" not in rows[0] else {}
    table = _columns([
        (_sampler(row) if not said else {"batch": str(row["batch"])}) | {
            **{f"{k} ms": _number(v, scale=1e3) for k, v in row["seconds"].items()},
            **{f"{k} images/s": _number(row["batch"] / v) for k, v in row["seconds"].items()},
            "ratio": f"{row['ratio']:.2f}",
            "spread": f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
        }
        for row in rows
    ])  # fmt: skip
    row = rows[0]
    return table + [
        f"ratio = torch / ours of the medians of {row['rounds']} rounds of {row['repeats']}, in turn in one process, "
        f"{row['threads']} CPU threads each; above 1 we are faster"
    ]


# --- the binary


def define():
    """The flags; not at import, so that the functions above can be used beside other binaries' flags."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", lock_config=False, accept_new_attributes=True)
    flags.DEFINE_enum("vs", "", ["", "torch"], "Measure the same model in plain PyTorch, too, and the ratio.")
    flags.DEFINE_integer("warmup", 3, "Steps, or sampling calls, before the clock starts; at least 1.", lower_bound=1)
    flags.DEFINE_integer("repeats", 0, "Timed steps or calls; 0: 20 steps or 5 calls, with --vs 5 or 1 in each round.", lower_bound=0)
    flags.DEFINE_integer("rounds", None, "With --vs: how often the two sides take turns; default 7.", lower_bound=1)
    flags.DEFINE_bool("synthetic", False, "Train on one fixed batch; --vs always does.")
    flags.DEFINE_bool("feed", False, "Measure the pipeline alone.")
    flags.DEFINE_bool("sampling", False, "Measure sampling, with fresh weights, instead of training.")
    flags.DEFINE_list("samplers", [], "With --sampling: names; default: the config's sampler.")
    flags.DEFINE_list("steps", [], "With --sampling: numbers of steps; default: the config's.")
    flags.DEFINE_integer("batch", 0, "With --sampling: samples per call; 0: the config's evaluate.batch.", lower_bound=0)
    flags.DEFINE_float("price", 0.0, "With --sampling: dollars an hour of all devices together, for dollars a megapixel.", lower_bound=0)
    flags.DEFINE_string("json", "", "File for everything that was measured, with device, versions and config.")
    flags.mark_flags_as_required(["config"])


def main():
    given = flags.FLAGS
    for name in ("samplers", "steps", "batch", "price"):
        if given[name].present and not given.sampling:
            raise ConfigError(f"--{name} is for --sampling")
    if given["rounds"].present and not given.vs:
        raise ConfigError("--rounds is for --vs")
    if given.feed and (given.sampling or given.vs or given.synthetic):
        raise ConfigError("--feed measures the pipeline alone; leave out --sampling, --vs and --synthetic")
    if given.price and given.vs:
        raise ConfigError("--price is for our side alone; leave out --vs")
    if given.synthetic and (given.sampling or given.vs):
        raise ConfigError("--synthetic is for training alone: sampling reads no data, and --vs always trains on one batch")
    try:
        counts = [int(n) for n in given.steps]
    except ValueError:
        raise ConfigError(f"--steps={','.join(given.steps)} should be whole numbers") from None
    target = pathlib.Path(given.json) if given.json else None
    if target and not target.parent.is_dir():
        raise ConfigError(f"--json={given.json}: there is no directory {target.parent}")
    if given.vs:
        # Both sides live on one GPU: ours must not take most of its memory in advance.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.setup()

    options = {"warmup": given.warmup} | ({"repeats": given.repeats} if given.repeats else {})
    options |= {"rounds": given.rounds} if given.rounds else {}
    options |= {"samplers": given.samplers, "steps": counts, "batch": given.batch} if given.sampling else {}
    options |= {"price": given.price} if given.price else {}
    if given.feed:
        results = feed(given.config, **options)
        lines = [
            f"pipeline alone: {_number(results['images_per_second'], digits=6)} images/s, "
            f"{_number(results['images_per_second_per_core'], digits=6)} a core of {threads()}, {_bytes(results['bytes_per_second'])}/s"
        ]
    elif given.vs:
        results = sample_vs_torch(given.config, **options) if given.sampling else [train_vs_torch(given.config, **options)]
        lines = table_vs_torch(results)
    elif given.sampling:
        results = sample(given.config, **options)
        lines = table_of_sampling(results)
    else:
        results = train(given.config, synthetic=given.synthetic, **options)
        lines = [f"{what:20} {value}" for what, value in table_of_training(results)]
    facts = machine()
    device = facts["device"]
    if jax.process_index() == 0:
        print(f"{device['count']} x {device['kind']} ({', '.join(f'{k} {v}' for k, v in facts['versions'].items())})")
        print("\n".join(lines))
        if target:
            what = "feed" if given.feed else "sampling" if given.sampling else "training"
            everything = {**facts, "command": sys.argv[1:], "config": given.config.to_dict(), what: results}
            target.write_text(json.dumps(everything, indent=1, default=str))
    return 0


if __name__ == "__main__":
    define()
    shell.run(main)
