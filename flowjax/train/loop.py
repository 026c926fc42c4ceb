"""The one training loop: config -> data -> state -> (restore) -> steps -> checkpoint.

Step k is dispatched before step k - 1 is read, so nothing blocks the device between steps.
"""

import concurrent.futures
import contextlib
import json
import signal
import threading
import time

import jax
import numpy as np

from flowjax import conditions, generate, storage
from flowjax.config import ConfigError
from flowjax.models import flops
from flowjax.train import card, checkpoint, goodput, log, optim, panel, pictures, posthoc, settings
from flowjax.train import mesh as mesh_lib
from flowjax.train import step as step_lib
from flowjax.train.assembly import Run


class NonFinite(FloatingPointError):
    """A loss or gradient stopped being finite; the message names the step and the parameters."""


def run(config, workdir, stop: threading.Event | None = None, began: float | None = None) -> int:
    """Train until config.steps, until what panel.stop says, or until SIGTERM / SIGINT (or `stop`) asks to save and leave; in that last
    case `stop` is set afterwards. Returns the last step.

    The same call with the same workdir (a folder, or a bucket's gs://...) resumes. began: time.monotonic() when the process
    started, for flowjax.train.goodput. Raises ConfigError on bad settings, before anything is written, and NonFinite when the
    loss does.
    """
    clock = goodput.Goodput(began)
    workdir = storage.path(workdir)
    this = Run(config)
    stop = stop or threading.Event()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_listen(stop))
        try:
            return _run(this, this.config, workdir, stop, jax.process_index() == 0, clock, cleanup)
        except jax.errors.JaxRuntimeError:
            if jax.process_count() > 1:
                cleanup.pop_all()  # closing waits for the other processes, one of which may be what was lost
            raise


def _run(this, config, workdir, stop, main, clock, cleanup):
    # --- trace everything that settings can break before a file is written
    position = this.pipeline.get_state()
    batch = mesh_lib.place(next(this.pipeline), this.mesh)
    this.pipeline.set_state(position)
    train_step = this.step()
    # A program for each size of images: one, but for buckets.
    lowered = {shape: train_step.lower(this.target, this.frozen, this.batch(shape)) for shape in this.pipeline.shapes}
    draws = this.roles["net"].module.kind in ("denoiser", "autoencoder")
    draw = _drawer(this, workdir) if draws or config["sample"]["every"] else None
    validate = _validation(this) if config["validation"]["every"] else None
    measure = panel.Panel(this) if config["panel"]["every"] else None
    _check_best(config, lowered[this.pipeline.shape].out_info[1])
    _claim(workdir, this)
    if main:
        cleanup.enter_context(storage.owned(workdir))

    # --- compile once, beside what follows; a step of any other shape would raise instead of compiling again
    compiler = cleanup.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    compiling = compiler.submit(lambda: {shape: program.compile() for shape, program in lowered.items()})

    # --- state: fresh, or the newest intact checkpoint together with its place in the data
    saver = checkpoint.Checkpoints(workdir / "checkpoints", **{k: v for k, v in config["checkpoint"].items() if k != "every"})
    cleanup.callback(saver.close)
    found = saver.restore(this.target)
    window = {"rows": [], "done": 0, "drawn": time.monotonic()}
    saved, values, began = None, {}, measure.began if measure else ""
    if found is None:
        state, first = this.fresh(), 0
    else:
        state, extra, first = found
        if extra["frozen"] != this.fingerprints():
            raise ConfigError(f"the frozen networks changed since {workdir} began: {extra['frozen']} -> {this.fingerprints()}")
        if began and (was := extra.get("began")) and was != began:
            source = f"roles.net.checkpoint = {config['roles']['net']['checkpoint']!r}"
            raise ConfigError(f"{source} changed since {workdir} began, from which the panel measures kl")
        began = began or extra.get("began", "")
        this.pipeline.set_state(extra["data"])
        window["rows"], values, saved = extra["window"], extra["values"], first
    steps = config["steps"]
    halted = measure.halted(values) if measure else ""
    if first >= steps or halted:
        if main:
            print(f"{workdir} is already at step {first} of {steps}" + f", where it stopped ({halted})" * bool(halted))
        return first
    spent = workdir / "goodput.json"
    if main:
        clock.resume(spent, first)

    drawn = _times(this, state, batch, first)
    with clock.during("compile"):
        compiled = compiling.result()
    say = log.Log(workdir, first, steps, config["log"]["tensorboard"], config["log"]["progress"])
    cleanup.callback(say.close)
    rate = {k: jax.jit(schedule) for k, schedule in this.schedules.items()}
    facts = _facts(this, train_step, compiled[this.pipeline.shape], state, drawn, rate)
    if first == 0:
        say.say(card.write(workdir, facts))
    else:
        say.say(f"resumed {workdir} at step {first} of {steps}")
    flops_per_step = facts["cost"]["flops_per_step"]

    def save(step):
        rows = [{k: float(v) for k, v in row.items()} for row in window["rows"]]
        extra = {"data": this.pipeline.get_state(), "config": config, "frozen": this.fingerprints(), "window": rows, "values": values}
        extra |= {"began": began} if began else {}
        saver.save(step, state, extra, values)
        if main:
            say.flush()
            clock.keep(spent, saver.steps(), step)

    def curves(least: float = 0.0):
        """Draw them unless that was done less than `least` seconds ago: it takes a second, in which the device rests."""
        if main and time.monotonic() - window["drawn"] >= least:
            say.flush()
            pictures.curves(log.read(workdir / "metrics.jsonl"), workdir / "curves.png")
            window["drawn"] = time.monotonic()

    def look(step):
        """Measure samples; why to stop, or ""."""
        with clock.during("validation"):
            seen = measure(state)
        values.update(seen)
        say.write(step, seen)
        return measure.halted(values)

    def report(step, metrics, rates):
        """Read the metrics of a finished step; NonFinite names what went wrong. Nothing here may ask the device for more, which
        is busy with the step after."""
        metrics = jax.device_get(metrics)
        finite = metrics.pop("finite")
        for role, flags in finite.items():
            if not flags.all():
                names = [*checkpoint.names_of(this.target.params[role]), "the loss"]
                rewards = [k for k in metrics if k.startswith(("reward", f"{role}/reward")) and not np.isfinite(metrics[k])]
                bad = [f"the metric {k!r}" for k in rewards] + [n for n, ok in zip(names, flags) if not ok]
                raise NonFinite(
                    f"step {step}: not finite in role {role!r}: {', '.join(bad[:6])}{f' and {len(bad) - 6} more' if len(bad) > 6 else ''}; "
                    f"the state before it was kept, the last checkpoint is {max(saver.steps(), default=None)}"
                )
        window["rows"].append(metrics)
        window["done"] += 1
        if step % config["log"]["every"] and step != steps:
            return
        row = {k: _mean([row[k] for row in window["rows"]]) for k in metrics}
        values.update(row)
        now = clock.seconds()
        waited = now["data"] - window["since"]["data"]
        elapsed = now["step"] - window["since"]["step"] + waited
        speed = window["done"] / elapsed
        row |= {"steps_per_second": speed, "data_wait": waited / elapsed}
        row |= {f"rate/{role}" if len(rates) > 1 else "rate": float(rate) for role, rate in rates.items()}
        if peak := card.peak_flops():
            row["mfu"] = flops_per_step * speed / (peak * jax.device_count())
        say.write(step, row | clock.row())
        if main:
            clock.keep(spent)
        window.update(rows=[], done=0, since=now)

    # --- the loop: the batch is fetched while the device is busy with the step before
    clock.enter("step")
    window["since"] = clock.seconds()
    pending, step = None, first
    if measure and first == 0:
        halted = look(0)
    while step < steps and not halted and not _asked_to_stop(stop, step - first):
        clock.enter("data")
        batch = mesh_lib.place(next(this.pipeline), this.mesh)
        clock.enter("step", was="data" if pending is None or _ready(pending[1]) else "step")
        rates = {k: fn(np.float32(step // this.every[k] * this.updates[k])) for k, fn in rate.items()}
        state, metrics = compiled[_shape(batch)](state, this.frozen, batch)
        step += 1
        if pending:
            report(*pending)
            say.advance(pending[0], loss=_first_loss(pending[1]))
        pending = step, metrics, rates
        every = {k: config[k]["every"] for k in ("checkpoint", "validation", "panel", "sample")}
        due = {k: n > 0 and (step % n == 0 or step == steps) for k, n in every.items()}
        kept = [k for k, (_, every) in this.snapshots.items() if step % every == 0 or step == steps]
        if kept or any(due.values()):
            report(*pending)
            pending = None
            with clock.during("save"):
                for name in kept:
                    posthoc.save(workdir, name, step, this.snapshots[name][0], state.ema[name])
            if due["validation"]:
                with clock.during("validation"):
                    values["validation_loss"] = validate(state)
                say.write(step, {"validation_loss": values["validation_loss"]})
            if due["panel"]:
                halted = look(step)
            if due["sample"]:
                with clock.during("sample"):
                    draw(state, step)
                    curves(least=60.0)
            if due["checkpoint"]:
                with clock.during("save"):
                    save(step)
                saved = step
    if pending:
        report(*pending)
    with clock.during("save"):
        if step != saved:
            save(step)
        saver.wait()
    say.advance(step)
    with clock.during("sample"):
        curves()
    if main:
        clock.keep(spent, saver.steps(), step)
    if step < steps and not halted:
        stop.set()
    ended = f"stopped by {halted}," if halted else "stopped on request" if step < steps else "done"
    say.say(f"{ended} at step {step}: {workdir} ({clock.text()})")
    return step


def _asked_to_stop(stop, turn) -> bool:
    """Whether to stop before another step. turn: how often this was asked before.

    Several processes must stop before the same step, and hear of it at different moments. jax settles that in the background:
    SIGTERM at any of them makes all agree on the next step that none has begun, without waiting for a device.
    """
    if jax.process_count() == 1:
        return stop.is_set()
    from jax.experimental import multihost_utils

    if stop.is_set():
        signal.raise_signal(signal.SIGTERM)  # jax listens to it
    return multihost_utils.reached_preemption_sync_point(turn + 1)


def _shape(batch) -> tuple[int, ...]:
    """Shape of an example of the batch."""
    return batch["ranked"].shape[2:] if "ranked" in batch else (batch["x"] if "x" in batch else batch["win"]).shape[1:]


def _ready(metrics) -> bool:
    """Whether the device has finished the step of these metrics."""
    return all(v.is_ready() for v in jax.tree.leaves(metrics))


def _check_best(config, metrics):
    """ConfigError unless checkpoint.best names something that this run measures."""
    valid = [k for k in metrics if k != "finite"] + ["validation_loss"] * bool(config["validation"]["every"])
    best = config["checkpoint"]["best"]
    if best and best not in valid:
        raise ConfigError(f"checkpoint.best = {best!r} is not measured by this run; valid: {', '.join(valid)}")


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
        stored = json.loads(file.read_text())
        if "tokenizer" in stored["data"] and stored["data"]["tokenizer"] != info["data"].get("tokenizer"):
            raise ConfigError(f"the tokenizer changed since {workdir} began: {stored['data']['tokenizer']} -> {info['data'].get('tokenizer')}")
        was, now = (_content(i["data"]) for i in (stored, info))
        if None not in was and None not in now and was != now:
            raise ConfigError(f"the data changed since {workdir} began (content {was} -> {now}); use a new workdir")
        # Before the file says that the run was trained with what is there now.
        if stored.get("frozen", {}) != (frozen := json.loads(json.dumps(info["frozen"]))):
            raise ConfigError(f"the frozen networks changed since {workdir} began: {stored.get('frozen')} -> {frozen}")
        if (begun := stored.get("continued", {})) != info["continued"]:
            raise ConfigError(f"the average that roles.*.average goes on with has moved since {workdir} began: {begun} -> {info['continued']} updates")
        # Resolved anew, so that a setting which a later version added counts as its default.
        before = settings.resolve(stored["config"])
        changed = settings.differences(before, this.config)
        refused = [line for line in changed if not line.startswith(tuple(settings.MAY_CHANGE))]
        both = before["steps"], this.config["steps"]
        if _rates(this, both[0], min(both)) != _rates(this, both[1], min(both)):
            refused.append(f"steps: {before['steps']} -> {this.config['steps']} changes the learning rate's schedule")
        if refused:
            raise ConfigError(f"{workdir} belongs to a run with other settings; use a new workdir:\n  " + "\n  ".join(refused))
    if jax.process_index():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(info, indent=1, default=str))
    temporary.replace(file)


def _content(manifest) -> list[str | None]:
    """Hashes of what the data sets hold, None where one has no hash."""
    return [part.get("content_hash") for part in manifest.get("parts", [manifest])]


def _rates(this, steps, until):
    """Learning rates, up to step `until`, of a run of so many steps."""
    sections = {k: (this.config["roles"].get(k) or {}).get("optimizer") or this.config["optimizer"] for k in this.trained}
    schedules = [optim.schedule_of(section, -(-steps * this.updates[k] // this.every[k])) for k, section in sections.items()]
    ends = [until * this.updates[k] / this.every[k] for k in sections]
    return [np.asarray(s(np.linspace(0, end, 64, dtype=np.float32))).tolist() for s, end in zip(schedules, ends)]


def _listen(stop):
    """SIGINT and SIGTERM set `stop` (a second SIGINT interrupts at once); returns the function that restores the handlers."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may
        return lambda: None

    def handle(signum, frame):
        if stop.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        print(f"\n{signal.Signals(signum).name}: saving after this step ...", flush=True)
        stop.set()

    # Of several processes, jax handles SIGTERM (_asked_to_stop).
    signals = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
    before = {s: signal.signal(s, handle) for s in signals}
    return lambda: [signal.signal(s, h) for s, h in before.items()]


def _validation(this):
    """validate(state): mean loss over the same held-out batches with the same noise and times every time."""
    section = this.config["validation"]
    stream = this.stream(section["split"], 0, shuffle=False)
    start, loss = stream.get_state(), this.validate()

    def validate(state):
        stream.set_state(start)
        batches = (mesh_lib.place(next(stream), this.mesh) for _ in range(section["batches"]))
        losses = [loss(state, this.frozen, batch, i) for i, batch in enumerate(batches)]
        return float(np.mean(jax.device_get(losses)))

    return validate


def _drawer(this, workdir):
    """draw(state, step): samples of the net (or reconstructions of an autoencoder) as a picture in workdir/samples."""
    section = this.config["sample"]
    role = this.roles["net"]
    name = this.average("net")
    weights = lambda state: this.whole("net", state.params["net"] if name is None else state.ema[name])  # noqa: E731
    if role.module.kind == "autoencoder":
        x = np.asarray(this.first(10)["x"])
        fn = this.jit(lambda params, x: role.net(params).reconstruct(x))

        def draw(state, step):
            picture = np.concatenate([x, np.asarray(fn(weights(state), x))])
            if jax.process_index() == 0:
                pictures.grid(picture, workdir / "samples" / f"{step:07d}.png", columns=len(x))

        return draw
    if role.module.kind != "denoiser":
        raise ConfigError(f"sample.every = {section['every']}: a network of kind {role.module.kind!r} draws nothing; set it to 0")
    sample = this.sampler(section)
    count, cond = section["count"], this.asked(section)
    # Traced now, so that a bad sampler is refused before training, not at the first picture.
    jax.eval_shape(sample, this.drawing(this.network), section["seed"], np.arange(count), cond)

    def draw(state, step):
        x = generate.run(sample, this.drawing(weights(state)), cond, count, seed=section["seed"])
        if jax.process_index() == 0:
            pictures.samples(x, workdir / "samples" / f"{step:07d}.png", cond.get("label"))

    return draw


def _times(this, state, batch, first):
    """The times that the first steps draw, about 4096 of them, or None for objectives without."""
    blank = {k: np.zeros((len(v), *this.example[0].shape[1:]), this.example[0].dtype) for k, v in batch.items() if k in ("x", "win", "lose")}
    if "encoder" in this.frozen:
        blank["image"] = batch["x"]

    def draw(state, frozen, batch, steps):
        nets = step_lib.nets_of(this.objective, this.roles, state.params, state.ema, frozen)
        if "text" in nets:  # images are left out, as no time depends on them; captions may be looked at
            batch = {**batch, "cond": conditions.embed(nets["text"], batch["cond"])}
        rollout = lambda n: this.objective.rollout(nets, {**batch, "step": n}, step_lib.rollout_key(this.config["seed"], n))  # noqa: E731
        return jax.lax.map(lambda n: rollout(n).get("t"), steps)

    count = max(1, 4096 // this.config["batch_size"])
    return jax.device_get(this.jit(draw)(state, this.frozen, {**batch, **blank}, first + np.arange(count, dtype=np.int32)))


def _facts(this, train_step, compiled, state, drawn, rate):
    """The card's content. drawn: times that the first steps draw, or None; rate: learning rate as a function of the step, by role."""
    config = this.config
    memory = compiled.memory_analysis()
    counted = this.plain()
    flops_per_step = flops.count(train_step if counted is this else counted.step(), state, this.frozen, this.batch())
    dtypes = {str(v.dtype) for v in jax.tree.leaves(state.params)}
    facts = {
        "config": config,
        "start": card.start(this),
        "parameters": {k: f"{card.size(v):,} trained" for k, v in state.params.items()}
        | {f"{k}, not in its checkpoint": ", ".join(v) for k, v in this.added.items() if v}
        | {k + ", adapted" * (k in state.params): f"{card.size(v):,} frozen" for k, v in this.frozen.items()},
        "rules of the optimizer": card.rules(this),
        "data": this.pipeline.manifest,
        "shares of the data": card.shares(this),
        "batch": {"global": config["batch_size"], "slices": config["accumulate"], "per process": config["batch_size"] // jax.process_count()},
        "times": {"share of t in each tenth": card.histogram(drawn)} if drawn is not None else "none",
        "learning rate at step": {
            k: card.schedule_points(lambda n, k=k, fn=fn: fn(n // this.every[k] * this.updates[k]), config["steps"])
            for k, fn in rate.items()
        },
        "averages": card.averages(this.averages, config["steps"]) or "none",
        "dtypes": {"parameters": sorted(dtypes), "compute": getattr(this.roles["net"].module, "dtype", "float32")},
        "mesh": {**dict(this.mesh.shape), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "processes": jax.process_count()},
        "memory per device": {
            "state": card.human(card.bytes_per_device(state), "B"),
            **({"frozen networks": card.human(card.bytes_per_device(this.frozen), "B")} if this.frozen else {}),
            "temporaries of the step": card.human(memory.temp_size_in_bytes, "B") if memory else "unknown",
        },
        "cost": {"flops_per_step": flops_per_step, "per step": card.human(flops_per_step, "FLOP")},
    }
    return facts
