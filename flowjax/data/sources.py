"""Sources: a name and its settings -> random access to the examples of one split.

`read(indices)` returns a dict of columns: "image" uint8 (n, H, W, C), or a list of (H, W, C) of several sizes; "x" float32
(n, ...) for points; "win" and "lose" for preference pairs, "ranked" (n, K, H, W, C) for rankings, the best first; "label" int32
(n,); "caption" list of strings, several captions of an image on a line each; "text" and "pooled" floats, a caption's embeddings;
"desirable" int32 (n,), 1 for examples that are marked as good and 0 for bad ones.
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flowjax.config import ConfigError
from flowjax.data import counter, images, records
from flowjax.data.records import DataError

MARK = "desirable"
NOISE = 7  # a purpose of random numbers (flowjax.data.counter): which preferences are turned round


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Properties: `manifest` has at least name, split, count (None: endless), shape (height and width None where images
    differ), dtype, columns, num_classes (0: unlabelled) and class_names; `embeddings` {name: shape} where captions are embedded;
    `latents`, `embedded` and `tokenizer` where flowjax.data.latents says who made them, and with which tokenizer.
    """

    manifest: Mapping[str, Any]
    read: Callable[[np.ndarray], dict[str, Any]]

    @property
    def endless(self) -> bool:
        return self.manifest["count"] is None

    def __len__(self) -> int:
        if self.endless:
            raise TypeError(f"{self.manifest['name']} is endless")
        return self.manifest["count"]


def data_root(data_dir: str = "") -> pathlib.Path:
    """Where data sets are kept: `data_dir`, else $FLOWJAX_DATA, else ~/.cache/flowjax."""
    return pathlib.Path(data_dir or os.environ.get("FLOWJAX_DATA") or "~/.cache/flowjax").expanduser()


def digits(split: str, data_dir: str = "") -> Source:
    """scikit-learn's 8x8 digits, prepared under data_root(data_dir) on first use. Splits train (1,500) and test (297)."""
    from flowjax.data import digits as builder

    return tfds(split, directory=str(builder.prepare(data_root(data_dir))))


def tfds(
    split: str, dataset: str = "", data_dir: str = "", directory: str = "", image: str = "image", label: str = "label", caption: str = ""
) -> Source:
    """A TFDS data set prepared in array_record format: `directory`, or the newest version of data_root(data_dir)/dataset.

    `image`, `label` and `caption` name its features; label = "" leaves the labels out, caption = "" the captions.
    """
    import tensorflow_datasets

    from flowjax.data.prepare import open_tfds

    if bool(dataset) == bool(directory):
        raise ConfigError("data: give either dataset (with data_dir) or directory")
    path = pathlib.Path(directory).expanduser() if directory else _newest_version(data_root(data_dir) / dataset)
    builder = open_tfds(path)
    features, splits = dict(builder.info.features), builder.info.splits
    if split not in splits:
        raise ConfigError(f"split {split!r} is not in {path}; valid: {', '.join(splits)}")
    if not isinstance(features.get(image), tensorflow_datasets.features.Image):
        raise ConfigError(f"data.image = {image!r} is not an image feature of {path}; its features: {', '.join(features)}")
    if label and label in features and not isinstance(features[label], tensorflow_datasets.features.ClassLabel):
        raise ConfigError(f"data.label = {label!r} of {path} is not a ClassLabel; use label = '' to leave it out")
    labelled = bool(label) and label in features
    if caption and not isinstance(features.get(caption), tensorflow_datasets.features.Text):
        raise ConfigError(f"data.caption = {caption!r} is not a text feature of {path}; its features: {', '.join(features)}")
    shape = features[image].shape
    if shape[2] is None:
        raise ConfigError(f"{path} does not say how many channels its images have; run tools/prepare_data with --channels")
    rows = builder.as_data_source(split, decoders={image: tensorflow_datasets.decode.SkipDecoding()})

    def read(indices):
        found = rows.__getitems__([int(i) for i in indices])
        where = [f"{path} ({split} row {i})" for i in indices]
        out = {"image": [images.decode(io.BytesIO(r[image]), w, shape[2]) for r, w in zip(found, where, strict=True)]}
        if labelled:
            out["label"] = np.array([r[label] for r in found], np.int32)
        if caption:
            out["caption"] = [" ".join(r[caption].decode().split()) for r in found]  # one caption each, whatever its lines
        return out

    manifest = {
        "name": builder.info.name,
        "version": str(builder.info.version),
        "split": split,
        "count": splits[split].num_examples,
        "shape": list(shape),
        "dtype": "uint8",
        "columns": ["image"] + ["label"] * labelled + ["caption"] * bool(caption),
        "num_classes": features[label].num_classes if labelled else 0,
        "class_names": list(features[label].names) if labelled else [],
        "path": str(path),
    }
    return Source(manifest, read)


def _newest_version(root: pathlib.Path) -> pathlib.Path:
    if (root / "dataset_info.json").exists():
        return root
    versions = [f.parent for f in root.glob("*/dataset_info.json")]
    if not versions:
        raise DataError(f"{root}: no prepared TFDS data set (no <version>/dataset_info.json)")
    return max(versions, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])


def array_record(split: str, path: str, size: tuple = ()) -> Source:
    """A directory made by tools/prepare_data.py (or flowjax.data.records.write); size: (height, width) of one bucket, where it has some."""
    reader = records.Records(path, split, tuple(size))
    whole = reader.manifest
    kept = {k: whole[k] for k in ("name", "dtype", "num_classes", "class_names", "captions", "content_hash")}
    shape, ranks = whole["image_shape"], {}  # no shape, where captions are all there is
    if "ranked" in whole["features"]:
        shape, ranks = shape[1:], {"ranks": shape[0]}
    place = {"split": split, "count": len(reader), "shape": shape, "path": str(path)} | ranks
    manifest = kept | place | {"columns": list(whole["features"])}
    if stored := {k: whole["features"][k]["shape"] for k in ("text", "pooled") if k in whole["features"]}:
        manifest["embeddings"] = stored
    made = whole["source"]  # by flowjax.data.latents, where it has these
    manifest |= {k: made[k] for k in ("latents", "embedded") if k in made}
    if "embedded" in made:
        manifest["tokenizer"] = made["embedded"]["tokenizer"]
    return Source(manifest, reader.read)


def preferences(split: str, path: str, noise: float = 0.0, noise_seed: int = 0) -> Source:
    """Preference pairs written by `write_preferences`, or rankings written by `write_rankings`.

    noise: the order of so large a share of the examples of split "train" is turned round, of the same ones for the same noise_seed,
    and of those among them for a smaller share.
    """
    if not 0 <= noise <= 1:
        raise ConfigError(f"data.noise = {noise} should be a share, in [0, 1]")
    source = array_record(split, path)
    columns = {*source.manifest["columns"]}
    missing = {"win", "lose"} - columns
    if missing and "ranked" not in columns:
        raise ConfigError(f"data.path = {path!r} holds no {' and no '.join(sorted(missing))}: not a data set of preference pairs")
    if not noise or split != "train":
        return source
    key = counter.make_key(noise_seed, NOISE)

    def read(indices):
        out = source.read(indices)
        turned = (counter.uniform(key, np.asarray(indices)) < noise).reshape(-1, *(1,) * (len(source.manifest["shape"])))
        if "ranked" in out:
            return out | {"ranked": np.where(turned[:, None], out["ranked"][:, ::-1], out["ranked"])}
        return out | {"win": np.where(turned, out["lose"], out["win"]), "lose": np.where(turned, out["win"], out["lose"])}

    return Source(source.manifest | {"noise": noise, "noise_seed": noise_seed}, read)


def write_preferences(
    path, win, lose, label=None, num_classes: int = 0, meta: Mapping | None = None, overwrite: bool = False, captions=None,
    holdout: float = 0.0, files: Mapping[str, bytes] | None = None,
):  # fmt: skip
    """Write preference pairs as records; returns the manifest.

    **Arguments:** `win`, `lose` (n, ...) uint8 images or float32 arrays as a model makes them; `label` (n,) integers in
    0..num_classes - 1, `captions` n strings: what both of a pair were asked for; `meta` tells how the pairs came about and is kept in
    the manifest; `holdout`, in [0, 1), the share that becomes split "test", chosen by a hash of the images: a pair in either order is
    on one side; `files` are kept beside the records.
    """
    win, lose = np.asarray(win), np.asarray(lose)
    if win.shape != lose.shape or win.dtype != lose.dtype or win.dtype not in (np.uint8, np.float32) or win.ndim < 2:
        found = f"win {win.dtype}{win.shape} and lose {lose.dtype}{lose.shape}"
        raise ConfigError(f"{found} must be alike: uint8 or float32 (n, ...)")
    return _write(path, {"win": win, "lose": lose}, "preferences", label, num_classes, meta, overwrite, captions, holdout, files)


def write_rankings(
    path, ranked, label=None, num_classes: int = 0, meta: Mapping | None = None, overwrite: bool = False, captions=None,
    holdout: float = 0.0,
):  # fmt: skip
    """`write_preferences` of rankings: `ranked` (n, K, H, W, C) uint8, the best of each K first."""
    ranked = np.asarray(ranked)
    if ranked.ndim != 5 or ranked.shape[1] < 2 or ranked.dtype != np.uint8:
        raise ConfigError(f"ranked {ranked.dtype}{ranked.shape} must be uint8 (n, K, H, W, C), K at least 2")
    return _write(path, {"ranked": ranked}, "preferences", label, num_classes, meta, overwrite, captions, holdout)


def write_feedback(
    path, x, desirable, label=None, num_classes: int = 0, meta: Mapping | None = None, overwrite: bool = False, captions=None
):
    """Write examples that are marked one by one, good (True) or bad, as records with one split, train; returns the manifest.

    **Arguments:** `x` (n, ...) uint8 images or float32 arrays; `desirable` (n,) bools, not all alike; the rest as in `write_preferences`.
    """
    x, desirable = np.asarray(x), np.asarray(desirable)
    if x.dtype not in (np.uint8, np.float32) or x.ndim < 2:
        raise ConfigError(f"x {x.dtype}{x.shape} must be uint8 or float32 (n, ...)")
    if desirable.shape != x.shape[:1] or desirable.dtype != bool:
        raise ConfigError(f"{MARK} must hold {len(x)} bools, got {desirable.dtype}{desirable.shape}")
    if len(x) and desirable.all() == desirable.any():
        raise ConfigError(f"all {len(x)} examples are marked as {'good' if desirable.all() else 'bad'}: there is nothing to tell apart")
    columns = {"image" if x.dtype == np.uint8 else "x": x, MARK: desirable.astype(np.int32)}
    return _write(path, columns, "feedback", label, num_classes, meta, overwrite, captions)


def _write(path, columns, name, label, num_classes, meta, overwrite, captions, holdout=0.0, files=None):
    count = len(next(iter(columns.values())))
    members = [m for v in columns.values() for m in (v.swapaxes(0, 1) if v.ndim == 5 else [v])]
    if label is not None:
        label = columns["label"] = np.asarray(label, np.int32)
        if label.shape != (count,) or np.any((label < 0) | (label >= num_classes)):
            raise ConfigError(f"label must hold {count} integers in 0..{num_classes - 1} (num_classes = {num_classes})")
    if captions is not None:
        columns["caption"] = captions = list(captions)
        if len(captions) != count or not all(isinstance(c, str) and c.strip() for c in captions):
            raise ConfigError(f"captions must be {count} strings, none of them empty; got {len(captions)}")
    if not 0 <= holdout < 1:
        raise ConfigError(f"holdout = {holdout} should be a share, in [0, 1)")

    def side(i):
        digest = hashlib.sha256(b"".join(sorted(np.ascontiguousarray(m[i]).tobytes() for m in members))).digest()
        return "test" if int.from_bytes(digest[:8], "big") < holdout * 2**64 else "train"

    sides = [side(i) if holdout else "train" for i in range(count)]
    if holdout and len({*sides}) < 2:
        raise ConfigError(f"holdout = {holdout} of {count} pairs leaves one split empty; use another share or more pairs")
    rows = ((sides[i], f"{path} (row {i})", {k: v[i] for k, v in columns.items()}) for i in range(count))
    classes = num_classes if label is not None else 0
    return records.write(path, rows, name=name, num_classes=classes, source=meta, overwrite=overwrite, files=files)


def _toy(toy: str, split: str, seed: int = 0) -> Source:
    """Endless 2-D data (flowjax.data.toys); `seed` and the split choose the stream."""
    from flowjax.data.toys import TOYS

    if split not in ("train", "test"):
        raise ConfigError(f"split {split!r} of {toy} is unknown; valid: train, test")
    draw, class_names = TOYS[toy]
    key = counter.make_key(seed, split == "test")
    manifest = {
        "name": toy,
        "split": split,
        "count": None,
        "shape": [2],
        "dtype": "float32",
        "columns": ["x", "label"] if class_names else ["x"],
        "num_classes": len(class_names),
        "class_names": class_names,
        "seed": seed,
    }
    return Source(manifest, lambda indices: draw(np.asarray(indices), key))



SOURCES = {
    "digits": digits,
    "tfds": tfds,
    "array_record": array_record,
    "preferences": preferences,
    "mix4": functools.partial(_toy, "mix4"),
    "moons": functools.partial(_toy, "moons"),
    "checkerboard": functools.partial(_toy, "checkerboard"),
}
