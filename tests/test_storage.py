"""A run's small files and data in a bucket, through etils, on an object store in memory; arrays go through tensorstore (not tested)."""

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

from flowjax import storage
from flowjax.config import ConfigError
from flowjax.data import pipeline, records
from flowjax.evals import image
from flowjax.train import assembly, export, log, loop, pictures
from flowjax.train.goodput import Goodput
from tools import bench
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
    Bucket.pseudo_dirs[:] = [""]
    return storage.path("gs://bucket/run")


def test_paths():
    assert storage.path("/tmp/x") == pathlib.Path("/tmp/x") and type(storage.path("runs/x")) is type(pathlib.Path("runs/x"))
    assert storage.remote("gs://b/x") and storage.remote(storage.path("s3://b/x")) and not storage.remote(pathlib.Path("/b/x"))
    assert str(storage.path("gs://b/x") / "metrics.jsonl") == "gs://b/x/metrics.jsonl"
    assert storage.path(storage.path("gs://b/x")) == storage.path("gs://b/x")


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


def test_data_and_their_tokenizer_are_read_from_a_bucket(bucket, tmp_path, monkeypatch):
    """Shards by array_record's own reader of buckets, which here finds them in a folder."""
    import tokenizers
    from array_record.python import array_record_data_source

    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    rows = (("train", f"row {i}", {"image": x, "caption": "one two" if i % 2 else "two"}) for i, x in enumerate(images))
    records.write(tmp_path / "data", rows, name="small", shard_bytes=200)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "one": 1, "two": 2}, unk_token="[PAD]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "data" / "tokenizer.json"))
    bucket.mkdir(parents=True)
    for file in (tmp_path / "data").iterdir():
        (bucket / file.name).write_bytes(file.read_bytes())
    read, asked = array_record_data_source.ArrayRecordDataSource, []

    def reader(shards):
        asked.extend(shards)
        return read([shard.replace("gs://bucket/run", str(tmp_path / "data")) for shard in shards])

    monkeypatch.setattr(array_record_data_source, "ArrayRecordDataSource", reader)
    text = {"name": "file", "path": "gs://bucket/run/tokenizer.json", "length": 3}
    found = pipeline.arrays({"name": "array_record", "path": "gs://bucket/run", "text": text})
    np.testing.assert_array_equal(image.quantise(found["x"]), images)
    assert found["cond"]["tokens"].tolist() == [[2, 0, 0], [1, 2, 0]] * 3
    assert len(asked) > 1 and all(shard.startswith("gs://bucket/run/train-") for shard in asked)
    promised = {"name": "array_record", "path": "gs://bucket/run", "expect_shape": (8, 8, 3), "expect_classes": 0}
    with pytest.raises(ConfigError, match=r"shape of the examples: \(4, 4, 3\), but data.expect_shape"):
        bench.assembled(tiny(data=promised))  # looks at data that are there, as Run does
    manifest = records.read_manifest("gs://bucket/run")
    assert records.damaged("gs://bucket/run", manifest, thorough=True) == []
    whole = pathlib.Path(asked[0]).name
    (bucket / whole).write_bytes(bytes((bucket / whole).stat().length))
    assert records.damaged(bucket, manifest) == [] and records.damaged(bucket, manifest, thorough=True) == [asked[0]]
    (bucket / whole).unlink()
    with pytest.raises(records.DataError, match=f"{asked[0]}: missing or not of the size"):
        records.Records("gs://bucket/run", "train")
    with pytest.raises(records.DataError, match="gs://bucket/none/manifest.json does not exist"):
        pipeline.arrays({"name": "array_record", "path": "gs://bucket/none"})
    with pytest.raises(ConfigError, match="gs://bucket/new: a data set is written to a folder"):
        records.write("gs://bucket/new", [], name="small")


HOLD = """
import sys, time, pathlib
from flowjax import storage
with storage.owned(pathlib.Path(sys.argv[1])):
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
