"""Tiny runs for the tests of flowjax.train: configs, and what two runs may be compared by."""

import contextlib
import io
import json
import os
import pathlib
import threading
from unittest import mock

import jax
import numpy as np

from flowjax.train import log, loop, pictures, settings

# Digits are prepared once, beside the compile cache.
os.environ.setdefault("FLOWJAX_DATA", str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "data"))


def tiny(**changes):
    """Four Gaussians, an MLP of 8 units, 4 steps of 16 rows, nothing drawn; `changes` replace top-level keys."""
    values = dict(
        steps=4,
        batch_size=16,
        data={"name": "mix4"},
        model={"name": "mlp", "width": 8, "depth": 1, "num_classes": 4, "dropout": 0.1},
        objective={"name": "flow_matching", "label_drop": 0.1},
        optimizer={"name": "adamw", "schedule": {"name": "cosine", "rate": 1e-2, "warmup": 2}, "clip": 1.0},
        ema={"ema": {"name": "warmup", "decay": 0.9}},
        sample={"steps": 2, "sampler": "euler", "count": 8},
        log={"every": 1, "tensorboard": False, "progress": False},
        checkpoint={"every": 2, "keep": 3},
    )
    return settings.config_dict(**(values | changes))


DIT = {"name": "dit", "patch": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 10}


class StopAt(threading.Event):
    """A request to stop that arrives at the `n`-th time anybody looks."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


def train(config, workdir, stop_at=None):
    """loop.run, silently; returns (last step, what it printed)."""
    out = io.StringIO()
    # Drawing curves takes a second; the smoke tests of the binaries look at them.
    with contextlib.redirect_stdout(out), mock.patch.object(pictures, "curves"):
        step = loop.run(config, workdir, None if stop_at is None else StopAt(stop_at))
    return step, out.getvalue()


def rows(workdir):
    """metrics.jsonl without what depends on the clock."""
    clock = {"wall", "steps_per_second", "data_wait", "goodput"}
    return [{k: v for k, v in row.items() if k not in clock and not k.startswith("seconds/")} for row in log.read(workdir / "metrics.jsonl")]


def stored(workdir, step):
    """Everything that checkpoint `step` says of itself: fingerprints of every leaf, data position, config, ..."""
    from orbax.checkpoint import v1 as ocp

    return json.loads(ocp.load_checkpointables(workdir / "checkpoints" / str(step), {"extra": None})["extra"]["text"])


def same(a, b):
    """Two trees are equal bitwise, leaf by leaf."""
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [k for k, _ in a] == [k for k, _ in b]
    for (path, x), (_, y) in zip(a, b):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def flip(folder):
    """Flip a few bits of the stored arrays, and of nothing else, under folder."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.parent.name == "d"]
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        for part in range(1, 16):
            data[len(data) * part // 16] ^= 1
        file.write_bytes(data)
