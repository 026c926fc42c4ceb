"""What only real processes show: several of them joined by gloo, signals, exit codes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from flowjax.train import log
from train_runs import rows, stored

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = ["--config.log.tensorboard=false", "--config.log.progress=false", "--config.model.width=16", "--config.model.dropout=0.1"]
pytestmark = pytest.mark.slow


def start(workdir, *flags, devices=1):
    """python -m experiments.train in a process group of its own."""
    command = [sys.executable, "-m", "experiments.train", "--config=configs/mix4.py:smoke", f"--workdir={workdir}", *SETTINGS, *flags]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    options = dict(cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, start_new_session=True, **options)


def finish(*children, timeout=240):
    """[(exit code, output)]; the process groups are killed when one takes too long."""
    try:
        outputs = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    return [(child.returncode, out) for child, out in zip(children, outputs)]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one_and_resume_alone(tmp_path):
    port = free_port()
    join = lambda i: (f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={i}")  # noqa: E731
    finished = finish(start(tmp_path / "one", devices=2), *(start(tmp_path / "two", *join(i)) for i in (0, 1)))
    for code, out in finished:
        assert code == 0, out
    # One of the two speaks; both did all of validation, pictures and checkpoints without waiting for the other for ever.
    assert "done at step 4" in finished[1][1] and "done at step" not in finished[2][1]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [sorted(r) for r in one] == [sorted(r) for r in two] and len(one) >= 4
    for a, b in zip(one, two):
        for k in a:
            np.testing.assert_allclose(b[k], a[k], rtol=1e-5, err_msg=k)
    assert "validation_loss" in {k for row in two for k in row} and (tmp_path / "two" / "samples").exists()
    assert "processes: 2" in (tmp_path / "two" / "card.txt").read_text()
    assert stored(tmp_path / "two", 4)["data"] == {"next_index": 4}
    # The newest checkpoint lost, one process goes on from step 2 on its own.
    for name in ("one", "two"):
        for file in (tmp_path / name / "checkpoints" / "4").rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
    for code, out in finish(*(start(tmp_path / name, devices=2) for name in ("one", "two"))):
        assert code == 0 and "resumed" in out and "at step 2 of 4" in out, out
        assert "checkpoints/4 is damaged" in out
    again = rows(tmp_path / "two")
    for a, b in zip(one, again):
        for k in a:
            np.testing.assert_allclose(b[k], a[k], rtol=1e-5, err_msg=k)


def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    long = "--config.steps=100000", "--config.checkpoint.every=0", "--config.sample.every=0", "--config.validation.every=0"
    child = start(tmp_path / "run", *long)
    file, deadline = tmp_path / "run" / "metrics.jsonl", time.time() + 120
    while not (file.exists() and len(log.read(file)) > 3) and time.time() < deadline and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    ((code, out),) = finish(child)
    assert code == 0 and "SIGTERM: saving after this step" in out and "stopped on request at step" in out, out
    (step,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert step >= 3 and [r["step"] for r in log.read(file)] == list(range(1, step + 1))
    child = start(tmp_path / "run", *long)
    while child.poll() is None and time.time() < deadline + 120 and log.read(file)[-1]["step"] < step + 3:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    ((code, out),) = finish(child)
    assert code == 0 and f"resumed {tmp_path / 'run'} at step {step} of 100000" in out, out
    steps = [r["step"] for r in log.read(file)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


def test_exit_codes_and_plain_messages(tmp_path):
    """2 for settings and 3 for a loss that is not finite; one line each, no traceback."""
    cases = {
        "unknown": (["--config.optimizer={'name': 'sgd', 'momentun': 3, 'schedule': 'constant'}"], 2, "error: optimizer.momentun is unknown for sgd; valid: schedule, "),
        "misspelt": (["--config.model.widht=3"], 2, "error: model.widht is unknown; valid: width, depth"),
        "section": (["--config.modle.width=3"], 2, "error: a --config.section.key flag needs that section in the config"),
        "type": (["--config.model.width=wide"], 1, "flag --config.model.width=wide: invalid literal for int"),
        "stray": (["steps=3"], 2, "error: unexpected argument 'steps=3'; settings are given as --flag=value"),
        "processes": (["--processes=2"], 2, "mean something only together with --coordinator"),
        "infinite": (["--config.optimizer.schedule.rate=1e38", "--config.optimizer.schedule.warmup=0"], 3, "error: step "),
    }
    for name, (flags, code, message) in cases.items():
        ((got, out),) = finish(start(tmp_path / name, *flags))
        assert got == code and message in out and "Traceback" not in out, out
        assert (tmp_path / name).exists() == (name == "infinite")
    assert "not finite in role 'net': " in out and "the last checkpoint is" in out
