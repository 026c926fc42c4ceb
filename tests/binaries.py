"""The real binaries, run as a user runs them; what a workdir has to hold.

Each runs as __main__ in a process of its own, forked from one that has imported the libraries already: starting python and importing
them takes longer than most of these runs.
"""

import atexit
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARIES = (
    "jax", "jax.numpy", "flax.linen", "optax", "orbax.checkpoint", "grain", "tensorflow_datasets", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "scipy.stats", "scipy.optimize", "sklearn.svm", "PIL.Image", "flowjax.train.loop", "flowjax.evals.evaluate",
)  # fmt: skip


@functools.cache
def _forkserver():
    """Its children are processes of one CPU device; jax reads that when it is imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    with mock.patch.dict(os.environ, {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}):
        multiprocessing.forkserver.ensure_running()
    return context


def _python(arguments, devices, home, env, said):
    """What `python arguments` does, in this process, which is done with afterwards."""
    os.setsid()
    gc.set_threshold(100_000, 50, 50)  # as in conftest.py
    os.chdir(home)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if devices > 1:
        import jax

        jax.config.update("jax_num_cpu_devices", devices)
    how, what, *flags = arguments
    sys.argv, sys.path[0] = [what if how == "-m" else how, *flags], str(ROOT)
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()


class Python:
    """`python -m module flags` or `python -c script flags` as subprocess.Popen has it, in a process group of its own; what it prints
    goes to a file."""

    def __init__(self, *arguments, home=ROOT, devices=1, env=()):
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), **dict(env)}
        handle, self.said = tempfile.mkstemp(prefix="said-")
        os.close(handle)
        self.process = _forkserver().Process(target=_python, args=(arguments, devices, home, env, self.said))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout):
        """(what it printed, None), once it has ended; TimeoutExpired where it has not by then."""
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired(self.process.name, timeout, pathlib.Path(self.said).read_text())
        said = pathlib.Path(self.said)
        text = said.read_text()
        said.unlink()
        return text, None


def shell_in(home):
    """run(module, *flags, code=0) -> what it printed, in the directory `home` on one CPU device; run.home is that directory."""

    def run(module, *flags, code=0):
        child = Python("-m", module, *flags, home=home, env={"FLOWJAX_DATA": str(home / "data")})
        try:
            text, _ = child.communicate(600)
        finally:
            child.kill()
        assert child.returncode == code, f"{module} {' '.join(flags)} ended with {child.returncode}\n{text[-6000:]}"
        return text

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
