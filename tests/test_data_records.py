"""The native format: exact values, whole or absent, never replaced by accident, damage named."""

import json
import multiprocessing
import os

import numpy as np
import pytest

from flowjax.config import ConfigError
from flowjax.data import records
from flowjax.data.records import DataError


def rows(n=10, offset=0, split="train"):
    for i in range(n):
        yield split, f"file {i}", {"image": np.full((3, 2, 1), i + offset, np.uint8), "label": i % 2, "caption": f"é {i}"}


def write(path, n=10, offset=0, **kwargs):
    return records.write(path, rows(n, offset), name="test", num_classes=2, **kwargs)


def test_values_come_back(tmp_path):
    z = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    examples = (("train", "", {"x": z[i].T if i % 2 else np.asfortranarray(z[i].T), "n": np.float64(i) / 3}) for i in range(6))
    made = records.write(tmp_path / "a", examples, name="floats")
    out = records.Records(tmp_path / "a", "train").read([4, 1, 1])
    assert made["features"] == {"n": {"dtype": "float64", "shape": []}, "x": {"dtype": "float32", "shape": [3, 2]}}
    np.testing.assert_array_equal(out["x"], np.swapaxes(z, 1, 2)[[4, 1, 1]])
    np.testing.assert_array_equal(out["n"], np.array([4, 1, 1]) / 3)
    assert out["x"].dtype == np.float32 and out["x"].flags.writeable
    assert made["image_shape"] == [3, 2] and made["num_classes"] == 0 and not made["captions"]


def test_shards(tmp_path):
    made = write(tmp_path / "a", shard_bytes=100)
    shards = made["splits"]["train"]["shards"]
    assert len(shards) > 2 and sum(s["count"] for s in shards) == 10 == made["splits"]["train"]["count"]
    assert [s["file"] for s in shards][:2] == ["train-00000.array_record", "train-00001.array_record"]
    for s in shards:
        assert (tmp_path / "a" / s["file"]).stat().st_size == s["bytes"] and len(s["sha256"]) == 64
    assert {f.name for f in (tmp_path / "a").iterdir()} == {s["file"] for s in shards} | {"manifest.json"}
    out = records.Records(tmp_path / "a", "train").read([9, 0, 4])
    assert out["caption"] == ["é 9", "é 0", "é 4"] and out["label"].tolist() == [1, 0, 0]
    # The content, not its cutting into files, is what the hash names.
    assert made["content_hash"] == write(tmp_path / "b")["content_hash"]
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o755


def test_content_hash_sees_every_change(tmp_path):
    def many():
        yield write(tmp_path / "0")
        yield write(tmp_path / "1", n=9)
        yield write(tmp_path / "2", offset=1)
        yield records.write(tmp_path / "3", rows(), name="test", num_classes=3)
        yield records.write(tmp_path / "4", rows(), name="test", num_classes=2, class_names=["a", "b"])
        yield records.write(tmp_path / "5", rows(split="test"), name="test", num_classes=2)

    assert len({m["content_hash"] for m in many()}) == 6


def test_another_data_set_is_replaced_only_on_demand(tmp_path):
    path = tmp_path / "a"
    first = write(path, command="first")
    stamp = (path / "manifest.json").stat().st_mtime_ns
    assert write(path, command="second") == first
    assert (path / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="--overwrite"):
        write(path, offset=1)
    assert records.read_manifest(path) == first
    second = write(path, offset=1, overwrite=True)
    assert records.read_manifest(path) == second != first
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_damaged_copy_of_the_same_data_is_mended(tmp_path):
    made = write(tmp_path / "a")
    shard = tmp_path / "a" / "train-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    write(tmp_path / "a")
    assert not records.damaged(tmp_path / "a", made, thorough=True)


def test_foreign_directories_are_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("a", "file"):
        with pytest.raises(ConfigError, match=name):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "a" / "thesis.tex").exists() and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert records.Records(tmp_path / "empty", "train").read([3])["image"].max() == 3


def test_failure_leaves_nothing(tmp_path):
    def broken():
        yield from rows(5)
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="fire"):
        records.write(tmp_path / "a", broken(), name="x")
    with pytest.raises(DataError, match="no examples"):
        records.write(tmp_path / "a", iter(()), name="x")
    odd = [*rows(2), ("train", "odd.png", {"image": np.zeros((2, 2, 1), np.uint8), "label": 0, "caption": ""})]
    with pytest.raises(DataError, match=r"odd.png.*\[2, 2, 1\].*\[3, 2, 1\]"):
        records.write(tmp_path / "a", odd, name="x")
    assert not list(tmp_path.iterdir())


def test_damage_is_named(tmp_path):
    write(tmp_path / "a")
    shard = tmp_path / "a" / "train-00000.array_record"
    data = shard.read_bytes()
    for bad in (data[: len(data) // 2], b""):
        shard.write_bytes(bad)
        with pytest.raises(DataError, match=str(shard)):
            records.Records(tmp_path / "a", "train")
    shard.unlink()
    with pytest.raises(DataError, match=str(shard)):
        records.Records(tmp_path / "a", "train")
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    manifest = records.read_manifest(tmp_path / "a")
    assert not records.damaged(tmp_path / "a", manifest)
    assert records.damaged(tmp_path / "a", manifest, thorough=True) == [str(shard)]
    with pytest.raises(ConfigError, match="split 'valid' .* valid: train"):
        records.Records(tmp_path / "a", "valid")


def test_bad_manifests_are_named(tmp_path):
    with pytest.raises(DataError, match="tools.prepare_data"):
        records.read_manifest(tmp_path / "none")
    for text in ("{", "[]", json.dumps({"format": "other"})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=str(tmp_path / "manifest.json")):
            records.read_manifest(tmp_path)


def _write_at_once(args):
    path, offset = args
    try:
        return write(path, n=200, offset=offset)["content_hash"]
    except ConfigError as e:
        return str(e)


def test_processes_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        same = pool.map(_write_at_once, [(tmp_path / "a", 0)] * 3, chunksize=1)
        other = pool.map(_write_at_once, [(tmp_path / "b", 0), (tmp_path / "b", 1)], chunksize=1)
    assert len(set(same)) == 1 and same[0] == records.read_manifest(tmp_path / "a")["content_hash"]
    assert sum("--overwrite" in o for o in other) == 1  # one was first, the other refused
    assert not records.damaged(tmp_path / "a", records.read_manifest(tmp_path / "a"), thorough=True)
    assert {f.name for f in tmp_path.iterdir()} == {"a", "b"}
