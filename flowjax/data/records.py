"""The native format: a directory of ArrayRecord shards, one msgpack map per example, described by manifest.json.

An example is a flat dict of arrays (raw little-endian bytes), integers and strings; dtype and shape are the same for all
examples and stand in the manifest. Only the pictures of a data set in buckets differ in height and width: then a shard holds
those of one bucket, its shape stands with the shard, and the rows of a split are ordered by bucket.
Shards are written with group_size:1, i.e. for random access, and zstd-compressed.
A data set appears whole or not at all: it is written beside its destination and renamed.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

import flowjax
from flowjax import storage
from flowjax.config import ConfigError

FORMAT = "flowjax-records/1"
MANIFEST = "manifest.json"
SHARD_BYTES = 2**28
_MAIN = ("image", "win", "ranked", "x")  # the feature that an example is about


class DataError(ConfigError):
    """A data file is damaged, missing or does not fit the others; the message names the file."""


# --- examples <-> bytes -------------------------------------------------------------------------------------------------


def _feature(value) -> dict[str, Any]:
    if isinstance(value, str):
        return {"dtype": "str"}
    value = np.asarray(value)
    return {"dtype": value.dtype.name, "shape": list(value.shape)}


def _encode(example: Mapping[str, Any]) -> bytes:
    import msgpack

    def plain(value):
        if isinstance(value, str):
            return value
        value = np.asarray(value)
        return value.astype(value.dtype.newbyteorder("<")).tobytes()

    return msgpack.packb({k: plain(example[k]) for k in sorted(example)})


def _decode(records: list[bytes], features: Mapping[str, Any]) -> dict[str, Any]:
    import msgpack

    rows = [msgpack.unpackb(r) for r in records]
    out = {}
    for key, feature in features.items():
        column = [row[key] for row in rows]
        if feature["dtype"] != "str":
            flat = np.frombuffer(b"".join(column), np.dtype(feature["dtype"]).newbyteorder("<"))
            column = flat.astype(feature["dtype"]).reshape(len(rows), *feature["shape"])
        out[key] = column
    return out


# --- writing ------------------------------------------------------------------------------------------------------------


class _Part:
    """The shards of one split, or of one of its buckets, while they are written."""

    def __init__(self, folder: pathlib.Path, name: str, shard_bytes: int):
        self.folder, self.name, self.shard_bytes = folder, name, shard_bytes
        self.digest, self.shards, self.writer = hashlib.sha256(), [], None

    def add(self, record: bytes):
        from array_record.python.array_record_module import ArrayRecordWriter

        if self.writer is None:
            self.shards.append({"file": f"{self.name}-{len(self.shards):05d}.array_record", "count": 0})
            self.writer = ArrayRecordWriter(str(self.folder / self.shards[-1]["file"]), "group_size:1")
            self.room = self.shard_bytes
        self.writer.write(record)
        self.digest.update(hashlib.sha256(record).digest())
        self.shards[-1]["count"] += 1
        self.room -= len(record)
        if self.room <= 0:
            self.close()

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def describe(self, about: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the manifest says of each shard, with `about` in it."""
        files = [(shard, self.folder / shard["file"]) for shard in self.shards]
        return [{**shard, **about, "bytes": file.stat().st_size, "sha256": _sha256(file)} for shard, file in files]


def _sha256(file: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:  # hashlib.file_digest refuses files of a bucket
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write(
    out,
    examples: Iterable[tuple[str, str, Mapping[str, Any]]],
    *,
    name: str,
    num_classes: int = 0,
    class_names: Iterable[str] = (),
    source: Mapping[str, Any] | None = None,
    command: str = "",
    overwrite: bool = False,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    buckets: bool = False,
) -> dict[str, Any]:
    """Write a data set to the directory `out` and return its manifest.

    **Arguments:** `examples` yields (split, where, example): `where` names the file for error messages; `example` maps
    feature names to uint8/int/float arrays, integers (stored as int32) or strings. `files` are kept beside the shards, by name,
    and are part of the content. With `buckets`, images (H, W, C) may differ in height and width.

    Writing what is there already changes nothing; anything else that is there is replaced only with `overwrite`, and only
    if it is a data set of this format. **Errors:** DataError if an example does not look like the first one; ConfigError where
    `out` is a bucket.
    """
    if storage.remote(out):
        raise ConfigError(f"{out}: a data set is written to a folder, from which it can be copied into a bucket (gcloud storage cp --recursive)")
    out = pathlib.Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists())):
        raise ConfigError(f"{out} exists and is not a data set of flowjax; choose another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    folder.chmod(0o755)  # mkdtemp makes it private
    parts: dict[tuple, _Part] = {}  # by split and, in buckets, height and width
    try:
        features = None
        for split, where, example in examples:
            example = {k: np.asarray(v, np.int32) if isinstance(v, int | np.integer) else v for k, v in example.items()}
            seen = {k: _feature(example[k]) for k in sorted(example)}
            size: list[int] = []
            if buckets:
                *size, channels = seen[_main(seen)]["shape"]
                seen[_main(seen)]["shape"] = [None, None, channels]
            features = features or seen
            if seen != features:
                raise DataError(f"{where}: {_brief(seen)} differs from the examples before it: {_brief(features)}")
            if (split, *size) not in parts:
                parts[split, *size] = _Part(folder, "-".join([split, *["x".join(map(str, size))] * bool(size)]), shard_bytes)
            parts[split, *size].add(_encode(example))
        if not parts:
            raise DataError(f"{name}: no examples")
        splits: dict[str, dict[str, Any]] = {}
        for (split, *size), part in sorted(parts.items()):
            part.close()
            about = splits.setdefault(split, {"count": 0, "shards": []})
            about["shards"] += part.describe({"size": size} if size else {})
            about["count"] = sum(s["count"] for s in about["shards"])
        main = features.get(_main(features), {})
        manifest = {
            "format": FORMAT,
            "name": name,
            "features": features,
            "image_shape": main.get("shape"),
            "dtype": main.get("dtype"),
            "num_classes": int(num_classes),
            "class_names": list(class_names),
            "captions": "caption" in features,
            "splits": splits,
        }
        digests = {"/".join(map(str, k)): parts[k].digest.hexdigest() for k in sorted(parts)}
        content = {k: manifest[k] for k in ("features", "num_classes", "class_names")} | {"splits": digests}
        for file, value in (files or {}).items():
            (folder / file).write_bytes(value)
            content[f"file {file}"] = hashlib.sha256(value).hexdigest()
        manifest["content_hash"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        manifest |= {"code_version": flowjax.__version__, "source": dict(source or {}), "command": command}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        return _install(folder, out, manifest, overwrite)
    finally:
        for part in parts.values():
            part.close()
        shutil.rmtree(folder, ignore_errors=True)


def _main(features) -> str:
    """Name of the feature that the examples are about, or "" where they are about something else."""
    return next((k for k in _MAIN if k in features), "")


def _brief(features) -> str:
    return ", ".join(f"{k} {f['dtype']}{f.get('shape', '')}" for k, f in features.items())


def _install(folder: pathlib.Path, out: pathlib.Path, manifest, overwrite: bool):
    """Move `folder` to `out`; returns the manifest that stands there afterwards."""
    with contextlib.suppress(OSError):  # the destination is there and not empty, perhaps since a moment ago
        os.rename(folder, out)
        return manifest
    old = read_manifest(out)
    same = old["content_hash"] == manifest["content_hash"]
    if same and not damaged(out, old):
        return old
    if not (same or overwrite):
        raise ConfigError(
            f"{out} holds another data set ({old['name']}, content {old['content_hash'][:12]}; "
            f"this one is {manifest['name']}, {manifest['content_hash'][:12]}); use --overwrite or another directory"
        )
    aside = folder.with_suffix(".old")
    os.rename(out, aside)
    os.rename(folder, out)
    shutil.rmtree(aside)
    return manifest


# --- reading ------------------------------------------------------------------------------------------------------------


def read_manifest(path) -> dict[str, Any]:
    """The manifest of the data set in directory `path`."""
    file = storage.path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(f"{file} does not exist; make a data set with `python -m tools.prepare_data --help`") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read: {e}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file} is not a manifest of format {FORMAT}")
    return manifest


def damaged(path, manifest, thorough: bool = False) -> list[str]:
    """Shards that are missing or of the wrong size and, if `thorough`, those whose bytes have changed."""
    folder = storage.path(path)

    def wrong(shard):
        file = folder / shard["file"]
        return storage.size(file) != shard["bytes"] or (thorough and _sha256(file) != shard["sha256"])

    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a bucket takes a tenth of a second to say it of one
        return [str(folder / shard["file"]) for shard, bad in zip(shards, pool.map(wrong, shards)) if bad]


def sizes(manifest, split: str) -> dict[tuple[int, int], int]:
    """{(height, width): number of images} of the buckets of a split, in the order of its rows; {} where its images are alike."""
    out: dict[tuple[int, int], int] = {}
    for shard in manifest["splits"].get(split, {"shards": ()})["shards"]:
        if "size" in shard:
            out[tuple(shard["size"])] = out.get(tuple(shard["size"]), 0) + shard["count"]
    return out


class Records:
    """Random access to one split: `read(indices)` gives a dict of stacked arrays (and lists of strings).

    size: height and width of the bucket that is wanted, of a data set in buckets; `manifest` then speaks of that alone.
    """

    def __init__(self, path, split: str, size: tuple[int, int] | tuple[()] = ()):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.manifest = read_manifest(path)
        if split not in self.manifest["splits"]:
            raise ConfigError(f"split {split!r} is not in {path}; valid: {', '.join(self.manifest['splits'])}")
        if bad := damaged(path, self.manifest):
            raise DataError(f"{', '.join(bad)}: missing or not of the size in {MANIFEST}; prepare the data again")
        shards = self.manifest["splits"][split]["shards"]
        if (valid := sizes(self.manifest, split)) or size:
            if tuple(size) not in valid:
                found = f"in buckets of {', '.join(f'{h} x {w}' for h, w in valid)}" if valid else "of one size"
                raise ConfigError(f"{path} holds images {found}; data.size = {tuple(size)}, but data.name = 'buckets' takes all of them")
            shards = [s for s in shards if s["size"] == list(size)]
            main = self.manifest["features"][_main(self.manifest["features"])]
            main["shape"] = self.manifest["image_shape"] = [*size, main["shape"][2]]
        self._source = ArrayRecordDataSource([str(storage.path(path) / s["file"]) for s in shards])

    def __len__(self):
        return len(self._source)

    def read(self, indices, names: tuple[str, ...] = ()) -> dict[str, Any]:
        """The features `names` (none: all) of the rows `indices`."""
        features = {k: v for k, v in self.manifest["features"].items() if not names or k in names}
        return _decode(self._source.__getitems__([int(i) for i in indices]), features)
