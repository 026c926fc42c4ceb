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
import sys
import time
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


def _binary(module, flags, home, env, said):
    """`python -m module *flags` in this process, which is done with afterwards."""
    gc.set_threshold(100_000, 50, 50)  # as in conftest.py
    os.chdir(home)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv, sys.path[0] = [module, *flags], str(ROOT)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def shell_in(home):
    """run(module, *flags, code=0) -> what it printed, in the directory `home` on one CPU device; run.home is that directory."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "FLOWJAX_DATA": str(home / "data"), "PYTHONPATH": str(ROOT)}

    def run(module, *flags, code=0):
        said = home / f".said-{time.monotonic_ns()}"
        process = _forkserver().Process(target=_binary, args=(module, flags, home, env, said))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        text = said.read_text()
        said.unlink()
        assert process.exitcode == code, f"{module} {' '.join(flags)} ended with {process.exitcode}\n{text[-6000:]}"
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
