"""The real binaries, run as a user runs them; what a workdir has to hold."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def shell_in(home):
    """run(module, *flags, code=0) -> what it printed, in the directory `home` on one CPU device; run.home is that directory."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "FLOWJAX_DATA": str(home / "data"), "PYTHONPATH": str(ROOT)}

    def run(module, *flags, code=0):
        done = subprocess.run(
            [sys.executable, "-m", module, *flags], cwd=home, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == code, f"{module} {' '.join(flags)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    run.home = home
    return run


def rows(workdir):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def check_workdir(workdir, drawn=True):
    """A run of four steps that logs each has left all that it should."""
    for name in ("config.json", "card.txt", "card.json", "metrics.jsonl", "curves.png", "checkpoints", "tensorboard"):
        assert (workdir / name).exists(), name
    losses = [row["loss"] for row in rows(workdir) if "loss" in row]
    assert len(losses) == 4 and all(isinstance(v, float) for v in losses)
    assert bool(list((workdir / "samples").glob("*.png"))) == drawn
