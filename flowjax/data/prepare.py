"""Doors: data as people have it, checked and turned into the native records (flowjax.data.records).

A door opens a path and yields (split, where, example); `where` names the file for messages. An example has "image"
(uint8 (H, W, C)) and, where known, "label" (int) and "caption" (str). Whatever does not fit is refused, never repaired.
"""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from flowjax.config import ConfigError, lookup
from flowjax.data import filters, images, records
from flowjax.data.records import DataError

Example = tuple[str, str, dict[str, Any]]


@dataclasses.dataclass
class Opened:
    """What a door found: examples (read once), classes (0 = unlabelled) and their names."""

    examples: Iterable[Example]
    num_classes: int = 0
    class_names: list[str] = dataclasses.field(default_factory=list)


# --- arrays: npz and idx ------------------------------------------------------------------------------------------------


def _checked_arrays(split: str, where: str, x: np.ndarray, where_y: str, y: np.ndarray | None):
    """Images as (N, H, W, C) uint8 and labels as (N,) integers, or a DataError that names the file."""
    if x.dtype != np.uint8:
        raise DataError(f"{where}: images are {x.dtype}; they must be uint8 in 0..255")
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[-1] not in (1, 3, 4):
        raise DataError(f"{where}: images have shape {x.shape}; expected (N, H, W) or (N, H, W, C) with C = 1, 3 or 4")
    if not x.size:
        raise DataError(f"{where}: no images (shape {x.shape})")
    if y is not None:
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
            raise DataError(f"{where_y}: labels are {y.dtype} of shape {y.shape}; expected integers of shape (N,)")
        if len(y) != len(x):
            raise DataError(f"{where_y}: {len(y)} labels for {len(x)} images; labels are missing or do not belong to them")
    return split, where, x, where_y, y


def _from_arrays(parts: list, class_names: tuple[str, ...]) -> Opened:
    labelled = [p for p in parts if p[4] is not None]
    if labelled and len(labelled) != len(parts):
        bare = next(p for p in parts if p[4] is None)
        raise DataError(f"{bare[1]}: split {bare[0]!r} has no labels but others have")
    num_classes = len(class_names)
    if labelled and not class_names:
        present = np.unique(np.concatenate([p[4] for p in labelled]))
        num_classes = int(present[-1]) + 1
        if len(present) != num_classes and present[0] >= 0:
            raise DataError(
                f"{labelled[0][3]}: labels run to {present[-1]} but only {len(present)} values occur, so they look damaged; "
                "if they are right, give --class_names for all of them"
            )
    for split, _, _, where, y in labelled:
        if bad := np.flatnonzero((y < 0) | (y >= num_classes)).tolist():
            raise DataError(f"{where}: label {y[bad[0]]} of {split} row {bad[0]} is outside 0..{num_classes - 1}")

    def examples() -> Iterator[Example]:
        for split, where, x, _, y in parts:
            for i in range(len(x)):
                label = {} if y is None else {"label": int(y[i])}
                yield split, f"{where} ({split} row {i})", {"image": x[i]} | label

    return Opened(examples(), num_classes if labelled else 0, list(class_names))


def npz(path: pathlib.Path, class_names: tuple[str, ...]) -> Opened:
    """x_train, y_train, x_test, y_test (the labels and the test split may be missing) or images, labels."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        raise DataError(f"{path}: not a readable npz, perhaps truncated ({e})") from None
    layouts = [("train", "x_train", "y_train"), ("test", "x_test", "y_test"), ("train", "images", "labels")]
    known = {k for _, x, y in layouts for k in (x, y)}
    if unknown := sorted(set(arrays) - known):
        raise DataError(f"{path}: arrays {', '.join(unknown)} are unknown; valid: {', '.join(sorted(known))}")
    parts = [_checked_arrays(s, str(path), arrays[x], str(path), arrays.get(y)) for s, x, y in layouts if x in arrays]
    splits = [p[0] for p in parts]
    if "train" not in splits or len(set(splits)) != len(splits):
        found = ", ".join(arrays)
        raise DataError(f"{path}: arrays {found}; give x_train (with y_train, x_test, y_test) or images (with labels)")
    return _from_arrays(parts, class_names)


def _read_idx(file: pathlib.Path) -> np.ndarray:
    """An idx file of unsigned bytes: two zero bytes, type 8, rank, big-endian sizes, data."""
    try:
        data = (gzip.decompress if file.suffix == ".gz" else bytes)(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{file}: cannot be read, perhaps truncated ({e})") from None
    header = 4 + 4 * data[3] if len(data) > 3 else 4
    if len(data) < header or data[:3] != b"\0\0\x08":
        raise DataError(f"{file}: not an idx file of unsigned bytes")
    shape = tuple(np.frombuffer(data[4:header], ">u4").astype(int).tolist())
    if len(data) - header != np.prod(shape):
        raise DataError(f"{file}: {len(data) - header} bytes of data for shape {shape}; the file is truncated or damaged")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def idx(path: pathlib.Path, class_names: tuple[str, ...]) -> Opened:
    """MNIST's files, .gz or not: one image file (its label file lies beside it), or a folder with train* and t10k*/test*."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if "images" in f.name and "idx" in f.name)
        found = {("test" if f.name.startswith(("t10k", "test")) else "train"): f for f in files}
        if len(found) != len(files) or "train" not in found:
            raise DataError(f"{path}: expected train-images-idx3-ubyte (or .gz), and at most one t10k-images-idx3-ubyte")
    else:
        found = {"train": path}
    parts = []
    for split, file in found.items():
        labels = file.with_name(file.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1"))
        if labels == file:
            raise DataError(f"{file}: the name of the image file must have 'images' in it, that of its labels 'labels'")
        parts.append(_checked_arrays(split, str(file), _read_idx(file), str(labels), _read_idx(labels)))
    return _from_arrays(parts, class_names)


# --- folders of images --------------------------------------------------------------------------------------------------


def _captions(root: pathlib.Path, found: list[pathlib.Path]) -> dict[pathlib.Path, str]:
    """Captions by image file, from captions.jsonl (lines with "file" and "caption", one or a list) or a .txt beside each image
    (a caption a line). Several captions of an image become lines of one string."""
    listing = root / "captions.jsonl"
    folders = {root, *(f.parent for f in found)}
    sidecars = sorted(f for f in root.rglob("*.txt") if f.parent in folders)
    captions: dict[pathlib.Path, str] = {}
    if listing.exists():
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                file, caption = root / row["file"], row["caption"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f'{listing} line {number}: expected {{"file": ..., "caption": ...}}') from None
            several = caption if isinstance(caption, list) else [caption]
            if not several or not all(isinstance(c, str) and c.strip() for c in several) or file in captions:
                raise DataError(f"{listing} line {number}: empty caption of {row['file']}, or a second line with captions of it")
            captions[file] = "\n".join(" ".join(c.split()) for c in several)
        where = str(listing)
    elif sidecars:
        by_stem = {f.with_suffix(""): f for f in found}
        if len(by_stem) != len(found):
            twice = next(f for f in found if by_stem[f.with_suffix("")] != f)
            raise DataError(f"{twice}: two images would share the caption {twice.with_suffix('.txt')}")
        for text in sidecars:
            lines = [" ".join(line.split()) for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
            if not lines:
                raise DataError(f"{text}: empty caption")
            captions[by_stem.get(text.with_suffix(""), text)] = "\n".join(lines)
        where = "its .txt"
    else:
        return {}
    if lonely := sorted(set(captions) - set(found)):
        raise DataError(f"{lonely[0]}: caption without image ({len(lonely)} in all)")
    if bare := sorted(set(found) - set(captions)):
        raise DataError(f"{bare[0]}: image without caption in {where} ({len(bare)} in all)")
    return captions


def _is_image(file: pathlib.Path) -> bool:
    return file.is_file() and file.suffix.lower() in images.SUFFIXES and not file.name.startswith(".")


def folder(path: pathlib.Path, channels: int) -> Opened:
    """Images in class sub-folders, or flat; with captions (captions.jsonl or .txt side files), or none.

    Sub-folders named train and test (only these) are the splits, each laid out in one of the ways above.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    inside = {f.name for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")}
    roots = {s: path / s for s in ("train", "test")} if inside == {"train", "test"} else {"train": path}
    plan, layouts = [], {}
    for split, root in roots.items():
        classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
        flat = sorted(f for f in root.iterdir() if _is_image(f))
        if classes and flat:
            raise DataError(f"{flat[0]}: lies beside class folders ({classes[0].name}, ...), so its label is missing")
        members = {d: sorted(f for f in d.rglob("*") if _is_image(f)) for d in classes}
        if empty := [d for d, files in members.items() if not files]:
            raise DataError(f"{empty[0]}: no images in this class folder")
        found = flat or [f for files in members.values() for f in files]
        if not found:
            raise DataError(f"{root}: no images ({', '.join(images.SUFFIXES)})")
        captions = _captions(root, found)
        layouts[split] = ([d.name for d in classes], bool(captions))
        label = {f: i for i, d in enumerate(classes) for f in members[d]}
        plan += [(split, f, label.get(f), captions.get(f)) for f in found]
    first, *others = layouts.values()
    if any(other != first for other in others):
        raise DataError(f"{path / 'test'}: its classes or captions differ from those of {path / 'train'}")

    def examples() -> Iterator[Example]:
        seen = channels
        for split, file, label, caption in plan:
            image = images.decode(file, str(file), channels)
            seen = seen or image.shape[-1]
            if image.shape[-1] != seen:
                raise DataError(f"{file}: {image.shape[-1]} channels where others have {seen}; give --channels")
            extra = {"label": label, "caption": caption}
            yield split, str(file), {"image": image} | {k: v for k, v in extra.items() if v is not None}

    return Opened(examples(), len(first[0]), first[0])


# --- TFDS ---------------------------------------------------------------------------------------------------------------


def open_tfds(path: pathlib.Path):
    """The builder of a prepared TFDS directory (name/version) in array_record format, its shards checked."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    info = path / "dataset_info.json"
    if not info.exists():
        raise DataError(f"{info} does not exist; give the directory <data set>/<version> of a prepared TFDS")
    builder = tfds.builder_from_directory(path)
    if builder.info.file_format.value != "array_record":
        raise DataError(f"{path}: written as {builder.info.file_format.value}; prepare it with file_format='array_record'")
    for split in builder.info.splits.values():
        for file, count in zip(split.filepaths, split.shard_lengths, strict=True):
            try:
                reader = ArrayRecordReader(str(file))
                found = reader.num_records() if reader.ok() else "no"
            except (RuntimeError, ValueError) as e:
                raise DataError(f"{file}: unreadable shard, perhaps truncated ({str(e).splitlines()[0]})") from None
            if found != count:
                raise DataError(f"{file}: {found} records readable where {count} are expected; the shard is truncated or damaged")
    return builder


def tfds(path: pathlib.Path, channels: int) -> Opened:
    """A prepared TFDS directory (.../<data set>/<version>) in array_record format with an "image" feature."""
    import io

    import tensorflow_datasets

    builder = open_tfds(path)
    features = dict(builder.info.features)
    if not isinstance(features.get("image"), tensorflow_datasets.features.Image):
        raise DataError(f"{path}: no image feature 'image' among {', '.join(features)}")
    if "label" in features and not isinstance(features["label"], tensorflow_datasets.features.ClassLabel):
        raise DataError(f"{path}: feature 'label' is not a ClassLabel")
    names = list(features["label"].names) if "label" in features else []
    channels = channels or features["image"].shape[2] or 0
    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}

    def examples() -> Iterator[Example]:
        for split in builder.info.splits:
            for i, row in enumerate(builder.as_data_source(split, decoders=decoders)):
                where = f"{path} ({split} row {i})"
                example = {"image": images.decode(io.BytesIO(row["image"]), where, channels)}
                if names:
                    example["label"] = _label_in_range(int(row["label"]), len(names), where)
                if "caption" in features:
                    example["caption"] = " ".join(row["caption"].decode().split())  # one caption, whatever its lines
                yield split, where, example

    return Opened(examples(), len(names), names)


def _label_in_range(label: int, num_classes: int, where: str) -> int:
    if not 0 <= label < num_classes:
        raise DataError(f"{where}: label {label} is outside 0..{num_classes - 1}")
    return label


DOORS = {"npz": npz, "idx": idx, "folder": folder, "tfds": tfds}


# --- the way through ----------------------------------------------------------------------------------------------------


def _fitted(examples: Iterable[Example], size: int, channels: int, buckets: list[tuple[int, int]]) -> Iterator[Example]:
    shape = None
    for split, where, example in examples:
        image = images.convert(example["image"], channels)
        if buckets:
            image = images.fit(image, *images.nearest_bucket(image.shape, buckets))
        image = images.resize(image, size) if size else image
        shape = shape or image.shape
        if image.shape != shape and not buckets:
            raise DataError(f"{where}: image is {image.shape} where others are {shape}; give --size or --area (and --channels)")
        yield split, where, example | {"image": image}


def _held_out(examples: Iterable[Example], fraction: float) -> Iterator[Example]:
    """Send `fraction` of the images to "test", chosen by a hash of their pixels: equal images never lie on both sides."""
    seen = set()
    for split, where, example in examples:
        if split != "train":
            raise ConfigError(f"--holdout: the data has a split {split!r} already; leave --holdout out")
        digest = hashlib.sha256(np.ascontiguousarray(example["image"]).tobytes()).digest()
        split = "test" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"
        seen.add(split)
        yield split, where, example
    if len(seen) < 2:
        raise ConfigError(f"--holdout = {fraction} leaves one split empty; use another fraction or more images")


def prepare(
    door: str,
    path,
    out,
    *,
    name: str = "",
    size: int = 0,
    channels: int = 0,
    holdout: float = 0.0,
    class_names: tuple[str, ...] = (),
    area: int = 0,
    step: int = 64,
    sides: tuple[int, int] = (0, 0),
    smallest_side: int = 0,
    caption_words: tuple[int, int] = (0, 0),
    duplicates: int = -1,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Turn the data at `path` into records in the directory `out`; returns the manifest.

    **Arguments:** `size` > 0 resizes (shorter side, antialiased bicubic) and crops the centre square; `channels` 1, 3 or 4
    converts; 0 keeps either. `area` > 0 makes buckets instead: each image is scaled and cropped to the size of nearest aspect ratio
    among images.bucket_sizes(area, step, *sides). `holdout` in (0, 1) makes a test split where there is none. `class_names` names
    the classes of npz and idx files in the order of their labels. `smallest_side`, `caption_words` and `duplicates` (bits, -1 for
    none) leave images out (flowjax.data.filters), counted in the manifest's source["dropped"].

    **Errors:** DataError naming the file that is damaged or does not fit. Nothing is left at `out` then.
    """
    lookup(DOORS, door, "--door")
    if channels not in (0, 1, 3, 4):
        raise ConfigError(f"--channels = {channels}; valid: 0 (as they are), 1, 3, 4")
    if size < 0 or not 0 <= holdout < 1:
        raise ConfigError(f"--size = {size} must be at least 0 and --holdout = {holdout} in [0, 1)")
    if area and size:
        raise ConfigError(f"--area = {area} and --size = {size}: give one of them, buckets or one size")
    if not area and (step != 64 or any(sides)):
        raise ConfigError(f"--step = {step} and --sides = {sides[0]},{sides[1]} are of buckets, and mean nothing without --area")
    buckets = images.bucket_sizes(area, step, *sides) if area else []
    kept = {}
    if smallest_side:
        kept["smallest_side"] = filters.smallest_side(smallest_side)
    if any(caption_words):
        kept["caption_words"] = filters.caption_words(*caption_words)
    if duplicates >= 0:
        kept["duplicates"] = filters.duplicates(duplicates)
    path = pathlib.Path(path).expanduser()
    if door in ("npz", "idx"):
        opened = DOORS[door](path, class_names)
    elif class_names:
        raise ConfigError(f"--class_names belongs to npz and idx; a {door} brings its own")
    else:
        opened = DOORS[door](path, channels)
    settings = {"door": door, "path": str(path), "size": size, "channels": channels, "holdout": holdout}
    if area:
        settings |= {"area": area, "step": step, "sides": list(sides)}
    if kept:
        settings |= {"smallest_side": smallest_side, "caption_words": list(caption_words), "duplicates": duplicates, "dropped": {}}
    examples = _fitted(filters.apply(opened.examples, kept, settings.get("dropped", {})), size, channels, buckets)
    return records.write(
        out,
        _held_out(examples, holdout) if holdout else examples,
        name=name or path.stem,
        num_classes=opened.num_classes,
        class_names=opened.class_names,
        source=settings,
        command=command,
        overwrite=overwrite,
        buckets=bool(area),
    )
