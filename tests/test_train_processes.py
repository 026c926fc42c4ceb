"""What only real processes show: several of them joined by gloo, signals, kills, exit codes."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from configs import digits
from flowjax.train import export, log
from flowjax.train.assembly import Run
from binaries import Python
from train_runs import DIT, rows, stored, tiny, train

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = ["--config.log.tensorboard=false", "--config.log.progress=false", "--config.model.width=16", "--config.model.dropout=0.1"]
ENDLESS = ["--config.steps=100000", "--config.sample.every=0", "--config.validation.every=0"]
pytestmark = pytest.mark.slow


def start(workdir, *flags, devices=1, config="mix4"):
    """python -m experiments.train."""
    settings = SETTINGS if config == "mix4" else SETTINGS[:2]
    flags = f"--config=configs/{config}.py:smoke", f"--workdir={workdir}", *settings, *flags
    return Python("-m", "experiments.train", *flags, devices=devices)


def job(workdir, *flags, processes=2, devices=1, config="mix4"):
    """The processes of one job, on as many devices each."""
    coordinator = f"--coordinator=localhost:{free_port()}", f"--processes={processes}", "--heartbeat=20"
    options = {"devices": devices, "config": config}
    return [start(workdir, *flags, *coordinator, f"--process_id={i}", **options) for i in range(processes)]


@contextlib.contextmanager
def reaped(*children):
    """The process groups are dead afterwards, whatever happens."""
    try:
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def finish(*children, timeout=240):
    """[(exit code, output)]; the process groups are killed when one takes too long."""
    with reaped(*children):
        outputs = [child.communicate(timeout=timeout)[0] for child in children]
    return [(child.returncode, out) for child, out in zip(children, outputs)]


def wait_for(step, workdir, *children, timeout=180):
    """Until the run has, from now on, written a row of that step or a later one; fails when a child ends before that."""
    file, now = workdir / "metrics.jsonl", time.time()
    while not (file.exists() and any(row["step"] >= step and row["wall"] > now for row in log.read(file))):
        assert time.time() < now + timeout and all(child.poll() is None for child in children)
        time.sleep(0.05)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def same_run(a, b):
    """Two runs say the same, to the digits that another order of adding up four gradients leaves. Whether bit for bit."""
    ours, theirs = rows(a), rows(b)
    assert [sorted(r) for r in ours] == [sorted(r) for r in theirs] and len(ours) >= 4
    for x, y in zip(ours, theirs):
        for k in x:
            np.testing.assert_allclose(y[k], x[k], rtol=2e-5, err_msg=k)
    ours, theirs = stored(a, 4), stored(b, 4)
    assert ours["data"] == theirs["data"] == {"next_index": 4} and ours["shapes"] == theirs["shapes"]
    return ours["fingerprints"] == theirs["fingerprints"]


def test_any_number_of_processes_trains_and_resumes_alike(tmp_path):
    """1, 2 and 4 processes on four devices in all: from the start, and from each other's checkpoints."""
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    plain = "--config.sample.every=0"
    ((code, out),) = finish(start(one, plain, devices=4))
    assert code == 0, out
    for code, out in finish(*job(two, plain, devices=2)):
        assert code == 0, out
    same_run(one, two)
    for source, target, processes in ((two, four, 4), (two, tmp_path / "two_one", 1)):
        # The newest checkpoint lost, another number of processes goes on from step 2.
        shutil.copytree(source, target)
        shutil.rmtree(target / "checkpoints" / "4")
        options = {"devices": 4 // processes}
        children = job(target, plain, processes=processes, **options) if processes > 1 else [start(target, plain, **options)]
        for code, out in (finished := finish(*children)):
            assert code == 0, out
        assert f"resumed {target} at step 2 of 4" in finished[0][1] and not any("resumed" in out for _, out in finished[1:])
        same_run(one, target)


def test_two_processes_equal_one_bit_for_bit_and_set_a_damaged_checkpoint_aside(tmp_path):
    """Two numbers have only one sum: two processes of a device each are one process of two, exactly."""
    one, two = tmp_path / "one", tmp_path / "two"
    for code, out in (finished := finish(*job(two)) + finish(start(one, devices=2))):
        assert code == 0, out
    # One of the two speaks; both did all of validation, pictures and checkpoints without waiting for the other for ever.
    assert "done at step 4" in finished[0][1] and all(line.startswith("[Gloo]") for line in finished[1][1].splitlines())
    want = rows(two)
    assert same_run(one, two) and want == rows(one)
    assert "validation_loss" in {k for row in want for k in row} and (two / "samples").exists()
    assert "processes: 2" in (two / "card.txt").read_text()
    for file in (two / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    for code, out in (finished := finish(*job(two))):
        assert code == 0 and "checkpoints/4 is damaged" in out, out
    assert "at step 2 of 4" in finished[0][1] and rows(two) == want


def test_two_processes_of_flow_grpo_equal_one_and_stop_together(tmp_path):
    """Groups lie on both, every rollout is used for two updates, and what ends the run is measured by both."""
    base = digits.get_config("smoke").to_dict()
    this, random = Run(base | {"model": base["model"] | {"depth": 1}}), np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.2 * random.standard_normal(p.shape, np.float32), this.target.params["net"])
    export.write(tmp_path / "start", params, this.info(0, "run"))
    section = {"checkpoint": str(tmp_path / "start")}
    flags = [f"--config.roles={{'reference': {section}, 'net': {section | {'updates': 2}}}}", "--config.panel.stop={'kl': {'above': 1e-9}}"]
    flags += ["--config.steps=1000", "--config.sample.every=0", "--config.checkpoint.every=0", "--config.batch_size=16"]
    # As little to compile as shows all of it.
    flags += ["--config.model.depth=1", "--config.objective.steps=2", "--config.panel.steps=2", "--config.panel.sampler=euler"]
    one, two = tmp_path / "one", tmp_path / "two"
    for code, out in (finished := finish(*job(two, *flags, config="digits_grpo")) + finish(start(one, *flags, devices=2, config="digits_grpo"))):
        assert code == 0, out
    assert "stopped by panel.stop: kl = " in finished[0][1] and "at step 2: " in finished[0][1]
    # Each has a share in the sums of a Frechet distance: its last digits may differ.
    ours, theirs = rows(one), rows(two)
    near = [[row.pop("panel/frechet/pixels", 0.0) for row in found] for found in (ours, theirs)]
    assert ours == theirs and near[0] == pytest.approx(near[1], rel=1e-9)
    assert stored(one, 2)["fingerprints"] == stored(two, 2)["fingerprints"]
    assert [row["step"] for row in rows(two) if "panel/kl" in row] == [0, 2] and any("clipped" in row for row in rows(two))


def goes_on(run, flags, step, signum, after):
    """Two processes resume a run at `step`, and leave it in order when process 0 is signalled `after` steps more."""
    with reaped(*job(run, *flags)) as children:
        wait_for(step + after, run, *children)
        children[0].send_signal(signum)
        finished = finish(*children, timeout=60)
    assert [code for code, _ in finished] == [0, 0] and f"resumed {run} at step {step} of 100000" in finished[0][1], finished
    steps = [r["step"] for r in rows(run)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


def test_sigterm_to_one_process_saves_a_common_step(tmp_path):
    run, flags = tmp_path / "run", [*ENDLESS, "--config.checkpoint.every=0"]
    with reaped(*job(run, *flags)) as children:
        wait_for(3, run, *children)
        children[1].send_signal(signal.SIGTERM)
        finished = finish(*children, timeout=60)
    assert [code for code, _ in finished] == [0, 0], finished
    assert "stopped on request at step" in finished[0][1] and "stopped on request" not in finished[1][1]
    (step,) = (int(p.name) for p in (run / "checkpoints").iterdir())
    assert step >= 3 and [r["step"] for r in rows(run)] == list(range(1, step + 1))
    assert stored(run, step)["data"] == {"next_index": step}
    goes_on(run, flags, step, signal.SIGINT, after=1)  # this time process 0 is asked, by Ctrl-C


@pytest.mark.parametrize("victim", [2, 0])
def test_a_killed_process_ends_the_job_which_resumes(victim, tmp_path):
    """kill -9 of one of three: the others say so and end at once, and two processes go on from the last checkpoint."""
    run, flags = tmp_path / "run", [*ENDLESS, "--config.checkpoint.every=10", "--config.batch_size=48"]
    with reaped(*job(run, *flags, processes=3)) as children:
        wait_for(22, run, *children)
        children[victim].kill()
        killed = time.time()
        finished = finish(*children, timeout=60)
    assert time.time() - killed < 25  # gloo notices at once; a process that hangs instead is found out by its silence, 20 s
    for i, (code, out) in enumerate(finished):
        if i == victim:
            assert code == -signal.SIGKILL
        elif victim or code == 4:
            before, plain, rest = out.partition(f"error: process {i} of 3 cannot go on, most likely because another one ended: ")
            assert code == 4 and plain and "the same command resumes from the last checkpoint" in rest and "Traceback" not in rest, out
            # What is traced before is orbax's own telling of a save that was under way.
            traced = re.findall(r'Traceback \(most recent call last\):\n +File "([^"]+)"', before)
            assert len(traced) == before.count("Traceback") and all("/orbax/" in file for file in traced), out
        else:  # jax may notice the loss of process 0, which coordinates, before we do, and ends the process itself
            assert code == -signal.SIGABRT and "another task died" in out, out
    last = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert last in (10, 20)  # that of step 20 may have been cut short
    goes_on(run, flags, last, signal.SIGTERM, after=2)


ROLLOUT = """
import sys
import jax, numpy as np
from flowjax.train import assembly, mesh, runtime, step
from train_runs import tiny

out, *where = sys.argv[1:]
runtime.setup(*runtime.job(*where[:1], *map(int, where[1:])))
run = assembly.Run(tiny())
batch = mesh.place(next(run.pipeline), run.mesh)

state = run.fresh()

def rollout(state, batch, n):
    nets = step.nets_of(run.objective, run.roles, state.params, state.ema, {})
    made = run.objective.rollout(nets, {**batch, "step": n}, step.rollout_key(run.config["seed"], n))
    return {k: made[k] for k in ("x", "z", "t")}

made = jax.jit(rollout, static_argnums=2, out_shardings=mesh.batch_sharding(run.mesh))
for n in (0, 1):
    b = made(state, batch, n)
    for name in ("z", "t", "x"):
        for shard in b[name].addressable_shards:
            np.save(f"{out}/{n}-{name}-{shard.index[0].start or 0}.npy", np.asarray(shard.data))
"""


def test_no_two_shards_share_noise(tmp_path):
    """Each device of each process draws its own rows of the noise and times that a single process draws for the whole batch."""
    env_path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    folders = {n: tmp_path / str(n) for n in (1, 2)}
    for processes, folder in folders.items():
        folder.mkdir()
        where = [(f"localhost:{free_port()}", str(processes))] * processes
        script = f"import sys; sys.path[:0] = {env_path.split(os.pathsep)!r}\n" + ROLLOUT
        children = [Python("-c", script, str(folder), *w, str(i), devices=4 // processes) for i, w in enumerate(where)]
        for code, out in finish(*children, timeout=120):
            assert code == 0, out
    files = [sorted(p.name for p in folder.iterdir()) for folder in folders.values()]
    assert files[0] == files[1] and len(files[0]) == 2 * 3 * 4  # steps, arrays, devices
    noise = []
    for name in files[0]:
        alone, together = (np.load(folder / name) for folder in folders.values())
        assert alone.shape[0] == 4 and alone.tobytes() == together.tobytes(), name
        if "-z-" in name:
            noise.append(alone)
    rows = np.concatenate(noise)
    assert rows.shape == (32, 2) and len(np.unique(rows[:, 0])) == len(np.unique(rows[:, 1])) == 32


EVALUATE = """
import runpy, sys
from flowjax import generate
from flowjax.evals import features

run = generate.run
def spy(*inputs, first=0, **settings):
    x = run(*inputs, first=first, **settings)
    print(f"made {len(x)} from {first}")
    return x
generate.run = spy
looked = features.dequantise
features.dequantise = lambda x: print(f"looked at {len(x)}") or looked(x)

sys.argv[0] = "evaluate"
runpy.run_module("experiments.evaluate", run_name="__main__")
"""


def test_processes_share_an_evaluation(tmp_path):
    """Each makes and looks at its own images, and process 0 writes what one process alone finds in all of them."""
    train(tiny(data={"name": "digits"}, model=DIT, steps=2), tmp_path / "run")
    flags = [f"--checkpoint={tmp_path / 'run'}", "--count=31", "--batch=5", "--features=pixels,pca", "--metrics=frechet,kid,prdc,agreement,memorisation"]
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + EVALUATE
    job = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--heartbeat=20"]
    where = {"one": [], "two": [*job, "--process_id=0"], "other": [*job, "--process_id=1"]}
    children = [Python("-c", script, *flags, f"--record={tmp_path / name}.json", *more) for name, more in where.items()]
    (_, one), (_, two), (_, other) = finished = finish(*children)
    assert [code for code, _ in finished] == [0, 0, 0], finished
    assert "made 31 from 0" in one and "made 15 from 0" in two and "made 16 from 15" in other
    assert "looked at 16" in other and "looked at 31" in one and not any(f"looked at {n}" in text for n in (31, 297) for text in (two, other))
    assert "record: " in two and "record: " not in other and not (tmp_path / "other.json").exists()
    alone, together = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert alone["samples"] == 31 and set(alone["results"]) >= {"frechet", "kid", "prdc", "agreement", "memorisation"}

    def numbers(value):
        return [x for v in value.values() for x in numbers(v)] if isinstance(value, dict) else [value]

    assert [str(v) for v in numbers(alone) if not isinstance(v, float)] == [str(v) for v in numbers(together) if not isinstance(v, float)]
    ours, theirs = ([v for v in numbers(x) if isinstance(v, float)] for x in (together, alone))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # of singular covariances, 31 samples of 64 features, roots of rounding errors


def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    run, flags = tmp_path / "run", [*ENDLESS, "--config.checkpoint.every=0"]
    with reaped(start(run, *flags)) as (child,):
        wait_for(4, run, child)
        child.send_signal(signal.SIGTERM)
        ((code, out),) = finish(child)
    assert code == 0 and "SIGTERM: saving after this step" in out and "stopped on request at step" in out, out
    (step,) = (int(p.name) for p in (run / "checkpoints").iterdir())
    assert step >= 3 and [r["step"] for r in rows(run)] == list(range(1, step + 1))
    with reaped(start(run, *flags)) as (child,):
        wait_for(step + 3, run, child)
        child.send_signal(signal.SIGINT)
        ((code, out),) = finish(child)
    assert code == 0 and f"resumed {run} at step {step} of 100000" in out, out
    steps = [r["step"] for r in rows(run)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


def test_exit_codes_and_plain_messages(tmp_path):
    """2 for settings and 3 for a loss that is not finite; one line each, no traceback."""
    cases = {
        "unknown": (["--config.optimizer={'name': 'sgd', 'momentun': 3, 'schedule': 'constant'}"], 2, "error: optimizer.momentun is unknown for sgd; valid: schedule, "),
        "misspelt": (["--config.model.widht=3"], 2, "error: model.widht is unknown; valid: width, depth"),
        "section": (["--config.modle.width=3"], 2, "error: a --config.section.key flag needs that section in the config"),
        "type": (["--config.model.width=wide"], 2, "error: flag --config.model.width=wide: invalid literal for int"),
        "stray": (["steps=3"], 2, "error: unexpected argument 'steps=3'; settings are given as --flag=value"),
        "processes": (["--processes=2"], 2, "mean something only together with --coordinator"),
        "auto": (["--coordinator=auto"], 2, "error: --coordinator=auto: neither a TPU pod, nor GKE, SLURM or Open MPI was found here"),
        "infinite": (["--config.optimizer.schedule.rate=1e38", "--config.optimizer.schedule.warmup=0"], 3, "error: step "),
    }
    for name, (flags, code, message) in cases.items():
        ((got, out),) = finish(start(tmp_path / name, *flags))
        assert got == code and message in out and "Traceback" not in out, out
        assert (tmp_path / name).exists() == (name == "infinite")
    assert "not finite in role 'net': " in out and "the last checkpoint is" in out
