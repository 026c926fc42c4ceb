"""The one training loop: config -> data -> state -> (restore) -> steps -> checkpoint.

Step k is dispatched before step k - 1 is read, so nothing blocks the device between steps.
"""

import json
import pathlib
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from flowjax import generate
from flowjax.config import ConfigError
from flowjax.models import flops
from flowjax.train import card, checkpoint, log, pictures, settings
from flowjax.train import mesh as mesh_lib
from flowjax.train import step as step_lib
from flowjax.train.assembly import Run


class NonFinite(FloatingPointError):
    """A loss or gradient stopped being finite; the message names the step and the parameters."""


def run(config, workdir, stop: threading.Event | None = None) -> int:
    """Train until config.steps, or until SIGTERM / SIGINT (or `stop`) asks to save and leave. Returns the last step.

    The same call with the same workdir resumes. Raises ConfigError on bad settings, before anything is written, and
    NonFinite when the loss does.
    """
    began = time.time()
    workdir = pathlib.Path(workdir)
    this = Run(config)
    config = this.config
    main = jax.process_index() == 0
    if main:
        _claim(workdir, this)
    stop = stop or threading.Event()
    restore_signals = _listen(stop)

    # --- state: fresh, or the newest intact checkpoint together with its place in the data
    saver = checkpoint.Checkpoints(workdir / "checkpoints", **{k: v for k, v in config["checkpoint"].items() if k != "every"})
    found = saver.restore(this.target)
    if found is None:
        state, first = this.fresh(), 0
    else:
        state, extra, first = found
        if extra["frozen"] != this.fingerprints():
            raise ConfigError(f"the frozen networks changed since {workdir} began: {extra['frozen']} -> {this.fingerprints()}")
        this.pipeline.set_state(extra["data"])
    steps = config["steps"]
    if first >= steps:
        saver.close()
        restore_signals()
        if main:
            print(f"{workdir} is already at step {first} of {steps}")
        return first

    # --- compile once; a step of any other shape would raise instead of compiling again
    batch = mesh_lib.place(next(this.pipeline), this.mesh)
    train_step = this.step()
    compiling = time.time()
    compiled = train_step.lower(state, this.frozen, batch).compile()
    compiling = time.time() - compiling
    say = log.Log(workdir, first, steps, config["log"]["tensorboard"], config["log"]["progress"])
    facts = _facts(this, train_step, compiled, state, batch, first)
    if first == 0:
        say.say(card.write(workdir, facts))
    else:
        say.say(f"resumed {workdir} at step {first} of {steps}")
    draw = _drawer(this, workdir)
    validate = this.validate() if config["validation"]["every"] else None
    flops_per_step = facts["cost"]["flops_per_step"]

    def save(step, values):
        extra = {"data": this.pipeline.get_state(), "config": config, "frozen": this.fingerprints()}
        saver.save(step, state, extra, values)

    def report(step, metrics, window):
        """Read the metrics of a finished step; NonFinite names what went wrong."""
        metrics = jax.device_get(metrics)
        finite = metrics.pop("finite")
        for role, flags in finite.items():
            if not flags.all():
                names = [*checkpoint.names_of(this.target.params[role]), "the loss"]
                bad = [n for n, ok in zip(names, flags) if not ok]
                raise NonFinite(
                    f"step {step}: not finite in role {role!r}: {', '.join(bad[:6])}{f' and {len(bad) - 6} more' if len(bad) > 6 else ''}; "
                    f"the state before it was kept, the last checkpoint is {max(saver.steps(), default=None)}"
                )
        window["rows"].append(metrics)
        if step % config["log"]["every"] and step != steps:
            return
        values = {k: _mean([row[k] for row in window["rows"]]) for k in metrics}
        elapsed = time.time() - window["since"]
        done = len(window["rows"])
        values |= {"steps_per_second": done / elapsed, "data_wait": window["waited"] / elapsed}
        values |= {f"rate/{k}" if len(this.schedules) > 1 else "rate": float(s(step - 1)) for k, s in this.schedules.items()}
        if peak := card.peak_flops():
            values["mfu"] = flops_per_step * done / elapsed / (peak * jax.device_count())
        say.write(step, values)
        window.update(rows=[], since=time.time(), waited=0.0)

    # --- the loop
    window = {"rows": [], "since": time.time(), "waited": 0.0}
    pending, step, values = None, first, {}
    try:
        while step < steps and not stop.is_set():
            state, metrics = compiled(state, this.frozen, batch)
            step += 1
            if pending:
                report(*pending, window)
                say.advance(pending[0], loss=_first_loss(pending[1]))
            pending = step, metrics
            due = {k: config[k]["every"] and (step % config[k]["every"] == 0 or step == steps) for k in ("checkpoint", "validation", "sample")}
            due["checkpoint"] = due["checkpoint"] or step == steps or stop.is_set()
            if any(due.values()):
                report(*pending, window)
                pending = None
            if due["validation"]:
                values = {"validation_loss": _validation(this, validate, state)}
                say.write(step, values)
            if due["sample"]:
                draw(state, step)
                if main:
                    pictures.curves(log.read(workdir / "metrics.jsonl"), workdir / "curves.png")
            if due["checkpoint"]:
                save(step, values)
            if due["validation"] or due["sample"] or due["checkpoint"]:
                window["since"] += 0.0 if window["rows"] else time.time() - window["since"]
            if step < steps and not stop.is_set():
                waiting = time.time()
                batch = mesh_lib.place(next(this.pipeline), this.mesh)
                window["waited"] += time.time() - waiting
        if pending:
            report(*pending, window)
        if step not in saver.steps():
            save(step, values)
        say.advance(step)
        saver.wait()
        if main:
            pictures.curves(log.read(workdir / "metrics.jsonl"), workdir / "curves.png")
        word = "stopped on request" if step < steps else "done"
        say.say(f"{word} at step {step}: {workdir} ({time.time() - began:.0f} s, of which {compiling:.0f} s compiling)")
    finally:
        say.close()
        saver.close()
        restore_signals()
    return step


def _mean(values):
    """Mean over the window of the steps at which the metric was measured (a resting player reports NaN)."""
    values = np.asarray(values, np.float64)
    return float(np.mean(values[~np.isnan(values)])) if not np.isnan(values).all() else float("nan")


def _first_loss(metrics):
    return float(next(v for k, v in metrics.items() if k.endswith("loss")))


def _claim(workdir, this):
    """Write config.json, or refuse a workdir that belongs to another configuration."""
    file = workdir / "config.json"
    info = this.info(0, "run")
    if file.exists():
        changed = settings.differences(json.loads(file.read_text())["config"], this.config)
        refused = [line for line in changed if not line.startswith(tuple(settings.MAY_CHANGE))]
        if refused:
            raise ConfigError(f"{workdir} belongs to a run with other settings; use a new workdir:\n  " + "\n  ".join(refused))
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(info, indent=1, default=str))
    temporary.replace(file)


def _listen(stop):
    """SIGINT and SIGTERM set `stop` (a second SIGINT interrupts at once); returns the function that restores the handlers."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handle(signum, frame):
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        print(f"\n{signal.Signals(signum).name}: saving after this step ...", flush=True)
        stop.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    return lambda: [signal.signal(s, h) for s, h in before.items()]


def _validation(this, validate, state):
    section = this.config["validation"]
    stream = this.stream(section["split"], 0, shuffle=False)
    losses = []
    for i in range(section["batches"]):
        losses.append(validate(state, this.frozen, mesh_lib.place(next(stream), this.mesh), i))
    return float(np.mean(jax.device_get(losses)))


def _drawer(this, workdir):
    """draw(state, step): samples of the net (or reconstructions of an autoencoder) as a picture in workdir/samples."""
    section = this.config["sample"]
    role = this.roles["net"]
    name = next((k for k, (_, of) in this.averages.items() if of == "net" and k not in this.objective.roles), None)
    weights = lambda state: state.params["net"] if name is None else state.ema[name]  # noqa: E731
    if role.module.kind == "autoencoder":
        x = np.asarray(next(this.stream("test", 0, shuffle=False))["x"][:10])
        fn = jax.jit(lambda params, x: role.net(params).decode(role.net(params).encode(x)[0]))

        def draw(state, step):
            picture = np.concatenate([x, np.asarray(fn(weights(state), x))])
            if jax.process_index() == 0:
                pictures.grid(picture, workdir / "samples" / f"{step:07d}.png", columns=len(x))

        return draw
    codec = this.roles["vae"].net(this.loaded["vae"][0]) if "vae" in this.roles else None
    options = {k: section[k] for k in ("steps", "sampler", "grid", "guidance")}
    sample = jax.jit(generate.make(role, this.example[0].shape[1:], codec=codec, **options))
    count, classes = section["count"], this.pipeline.num_classes
    cond = {"label": generate.balanced_labels(count, classes)} if classes else {}

    def draw(state, step):
        x = generate.run(sample, weights(state), cond, count, seed=section["seed"])
        if jax.process_index() == 0:
            pictures.samples(x, workdir / "samples" / f"{step:07d}.png", cond.get("label"))

    return draw


def _facts(this, train_step, compiled, state, batch, first):
    """The card's content."""
    config = this.config
    key = jax.random.key(config["seed"])
    live = step_lib.nets_of(this.objective, this.roles, state.params, state.ema, this.frozen)
    drawn = []
    blank = {k: jnp.zeros((config["batch_size"], *this.example[0].shape[1:]), jnp.float32) for k in ("x", "win", "lose") if k in batch}
    for i in range(max(1, 4096 // config["batch_size"])):
        out = this.objective.rollout(live, {**batch, **blank, "step": jnp.int32(first)}, jax.random.fold_in(key, i))
        if "t" not in out:
            break
        drawn.append(np.asarray(out["t"]))
    memory = compiled.memory_analysis()
    flops_per_step = flops.count(train_step, state, this.frozen, batch)
    dtypes = {str(v.dtype) for v in jax.tree.leaves(state.params)}
    facts = {
        "config": config,
        "parameters": {k: f"{card.size(v):,} trained" for k, v in state.params.items()}
        | {k: f"{card.size(v):,} frozen" for k, v in this.frozen.items()},
        "data": this.pipeline.manifest,
        "batch": {"global": config["batch_size"], "slices": config["accumulate"], "per process": config["batch_size"] // jax.process_count()},
        "times": {"share of t in each tenth": card.histogram(np.concatenate(drawn))} if drawn else "none",
        "learning rate at step": {k: card.schedule_points(s, config["steps"]) for k, s in this.schedules.items()},
        "averages": card.averages(this.averages, config["steps"]) or "none",
        "dtypes": {"parameters": sorted(dtypes), "compute": getattr(this.roles["net"].module, "dtype", "float32")},
        "mesh": {**dict(this.mesh.shape), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "processes": jax.process_count()},
        "memory per device": {
            "state": card.human(card.bytes_per_device(state), "B"),
            "temporaries of the step": card.human(memory.temp_size_in_bytes, "B") if memory else "unknown",
        },
        "cost": {"flops_per_step": flops_per_step, "per step": card.human(flops_per_step, "FLOP")},
    }
    return facts
