"""A run's small files in a bucket, through etils, on an object store in memory; arrays go through tensorstore (not tested)."""

import io
import json
import pathlib
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from flowjax.config import ConfigError
from flowjax.train import assembly, export, files, log, loop, pictures
from flowjax.train.goodput import Goodput
from train_runs import tiny


class Bucket(MemoryFileSystem):
    """What etils asks for when it meets gs://..., without appending, as object stores are."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]

    def __init__(self, *_, finalize_on_close=None, **options):
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode and "+" not in mode, "objects cannot be appended to"
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: {"gcs": Bucket}[name](**options))
    Bucket.store.clear()
    return files.path("gs://bucket/run")


def test_paths():
    assert files.path("/tmp/x") == pathlib.Path("/tmp/x") and type(files.path("runs/x")) is type(pathlib.Path("runs/x"))
    assert files.remote("gs://b/x") and files.remote(files.path("s3://b/x")) and not files.remote(pathlib.Path("/b/x"))
    assert str(files.path("gs://b/x") / "metrics.jsonl") == "gs://b/x/metrics.jsonl"
    assert files.path(files.path("gs://b/x")) == files.path("gs://b/x")


def test_rows_in_a_bucket_appear_with_the_checkpoint(bucket):
    bucket.mkdir(parents=True)
    written = log.Log(bucket, 0, 10, tensorboard=False, progress=False)
    written.write(1, {"loss": 1.0})
    written.write(2, {"loss": float("nan")})
    assert log.read(bucket / "metrics.jsonl") == []
    written.flush()
    steps = lambda: [row["step"] for row in log.read("gs://bucket/run/metrics.jsonl")]  # noqa: E731
    assert steps() == [1, 2]
    written.write(3, {"loss": 0.5})
    written.close()
    assert steps() == [1, 2, 3] and log.read(bucket / "metrics.jsonl")[1]["loss"] == "nan"
    # Resumed at step 2: the row after it goes, the others stay.
    resumed = log.Log(bucket, 2, 10, tensorboard=False, progress=False)
    resumed.write(3, {"loss": 0.25})
    resumed.close()
    assert steps() == [1, 2, 3] and log.read(bucket / "metrics.jsonl")[2]["loss"] == 0.25


def test_clock_pictures_and_config_in_a_bucket(bucket):
    clock = Goodput()
    clock.resume(bucket / "goodput.json", 0)
    clock.keep(bucket / "goodput.json", [], 4)
    again = Goodput()
    again.resume(bucket / "goodput.json", 4)
    assert again.seconds()["lost"] == 0 and set(json.loads((bucket / "goodput.json").read_text())["at"]) == {"4"}
    pictures.grid(np.zeros((4, 32, 32, 1)), bucket / "samples" / "1.png", columns=2)
    pictures.samples(np.zeros((4, 2)) + [1.0, 2.0], bucket / "samples" / "2.png", np.arange(4))
    pictures.curves([{"step": 1, "loss": 1.0, "seconds/step": 3.0}, {"step": 2, "loss": 0.5}], bucket / "curves.png")
    drawn = [(bucket / name).read_bytes() for name in ("samples/1.png", "samples/2.png", "curves.png")]
    sizes = [Image.open(io.BytesIO(data)).size for data in drawn]
    assert sizes == [(68, 68), (440, 440), (420, 260)]
    this = assembly.Run(tiny())
    loop._claim(bucket, this)
    loop._claim(bucket, this)
    assert export.info_of(bucket)["shape"] == [2] and not (bucket / "config.tmp").exists()
    with pytest.raises(ConfigError, match="gs://bucket/run belongs to a run with other settings"):
        loop._claim(bucket, assembly.Run(tiny(seed=1)))
    with pytest.raises(ConfigError, match="gs://bucket/other is neither an export nor a workdir"):
        export.info_of("gs://bucket/other")


HOLD = """
import sys, time, pathlib
from flowjax.train import files
with files.owned(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_workdir_belongs_to_one_process_at_a_time(tmp_path):
    """Two at once would overwrite each other's checkpoints and metrics; a killed one leaves the folder free."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"is being trained in by process {other.pid}"):
            loop.run(tiny(steps=1), tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoints").exists()
    finally:
        other.kill()
        other.wait()
    assert loop.run(tiny(steps=1), tmp_path) == 1
    assert loop.run(tiny(steps=1), tmp_path) == 1  # freed at the end of a run, too
