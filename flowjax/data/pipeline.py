"""Pipelines: a data section of the config -> an endless, exactly resumable stream of batches.

    {"x": float32 (b, H, W, C) in [-1, 1], or points as they are; "cond": {"label": int32 (b,)}, or {} when unlabelled}
    {"win": ..., "lose": ..., "cond": ...}                                                       for preference pairs
    {"ranked": (b, K, H, W, C), "cond": ...}                                          for rankings of K images, the best first
    {"x": ..., "z": ..., "cond": ...}                                       for couplings: z is the noise that x was made from
    {"x": ..., "desirable": bool (b,), "cond": ...}                                  for examples that are marked as good or bad
    {"x": int32 (b, L), "cond": {}}                           for data sets of captions alone: token ids, of one caption a row
    {"x": ..., "prior": bool (b,), "cond": ...}             for mixtures with `prior`: which rows are of the parts that it names

With a tokenizer (`text`, see flowjax.data.text) "cond" holds "tokens" too, of one of the image's captions; embeddings that are
stored with the examples ("text", "pooled") come along by themselves.

Batch number k is a function of (section, seed, k) alone: rows kB .. (k+1)B - 1 of one global stream, of which each process
reads its own block, so that the blocks in process order are exactly the batch of a single process. The order of rows is
computed for whole batches at once (flowjax.data.counter), a few microseconds where grain's MapDataset.shuffle takes 27 per
row; grain serves the batches: threads, prefetching, and a position that is one integer.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flowjax import conditions
from flowjax.config import ConfigError, arguments, check, lookup, split as split_section
from flowjax.data import counter, images, records, text as text_lib
from flowjax.data.records import DataError
from flowjax.data.sources import MARK, SOURCES

CACHE_BYTES = 2**29  # data sets up to this size, decoded, are held in memory
ARRAY_BYTES = 2**32  # what `arrays` may make
PREFETCH_BYTES = 2**28
CHUNK = 1024  # rows that `arrays` reads at a time
THREADS = 4

_ORDER, _FLIP, _CAPTION = 0, 1, 2  # purposes of random numbers
_PIXELS = {"image": "x", "x": "x", "z": "z", "win": "win", "lose": "lose", "ranked": "ranked"}  # column of a source -> entry of a batch


class _Empty(DataError):
    """Of a source nothing is left."""


class _Common(NamedTuple):
    """Settings of every section.

    classes: only the examples of these; limit: of what is left the first so many (0: all).
    resize: shorter side, centre crop; pad: then a black border up to this size; flip: left and right, by chance.
    text: the tokenizer of the captions, "" for none. An image may have several captions: one is chosen at "random" each time it
    is shown, or always the "first"; with curriculum = n the choice begins with the shortest and widens to all of them over the
    first n examples of the shuffled stream (of each bucket, of each part of a mixture); held-out examples are shown with all.
    expect_shape, expect_classes and expect_cond ({name: shape}, labels apart) say what the finished examples must be; with
    them a run can be planned without the data.
    """

    pad: int = 0
    resize: int = 0
    flip: bool = False
    text: Any = ""
    captions: str = "random"
    curriculum: int = 0
    classes: tuple = ()
    limit: int = 0
    expect_shape: tuple = ()
    expect_classes: int = -1
    expect_cond: Any = ()


def _shapes(cond) -> dict[str, tuple[int, ...]]:
    """expect_cond with its names checked."""
    for name in (cond := dict(cond)):
        lookup(dict.fromkeys(conditions.DTYPES.keys() - {"label"}), name, "data.expect_cond")
    return {k: tuple(v) for k, v in cond.items()}


class _Part:
    """One source with its transforms: reads rows by number and finishes them as float batches."""

    prior = False  # whether its rows are marked

    def __init__(self, section: Mapping[str, Any] | str, split: str, room: int | None = None):
        name, settings = split_section(section, "data")
        source = lookup(SOURCES, name, "data.name")
        common, own = arguments(_Common), arguments(source, ("split",))
        if unknown := [k for k in settings if k not in common and k not in own]:
            raise ConfigError(f"data.{unknown[0]} is unknown for {name}; valid: {', '.join([*own, *common])}")
        chosen = check(_Common, {k: v for k, v in settings.items() if k in common}, "data")
        common = self.common = _Common(**chosen)
        self.source = source(split, **check(source, {k: v for k, v in settings.items() if k in own}, "data", ("split",)))
        if common.classes or common.limit:
            self.source = _subset(self.source, common.classes, common.limit)
        self.manifest = dict(self.source.manifest) | {"transforms": chosen}
        self.textual = {*self.manifest["columns"]} == {"caption"}  # texts are what the examples are
        if self.textual and not common.text:
            raise ConfigError(f"{self.manifest['name']} has only captions; data.text, a tokenizer, makes examples of them")
        if not _PIXELS.keys() & set(self.manifest["columns"]) and not self.textual:
            found = ", ".join(self.manifest["columns"])
            raise ConfigError(f"{self.manifest['name']} has only {found}; one of these is needed: {', '.join(_PIXELS)}")
        self.num_classes = self.manifest["num_classes"]
        self.tokenizer = self._tokenizer()
        if self.textual:
            self.manifest |= {"shape": [self.tokenizer.length], "dtype": "int32"}
        self.shape = self._final_shape()
        self.conditions = {"label": ()} if self.num_classes else {}
        self.conditions |= {"tokens": (self.tokenizer.length,)} if self.tokenizer and not self.textual else {}
        self.conditions |= {k: tuple(shape) for k, shape in self.manifest.get("embeddings", {}).items()}
        for what, have, wanted in (
            ("shape", self.shape, tuple(common.expect_shape)),
            ("classes", self.num_classes, common.expect_classes if common.expect_classes >= 0 else None),
            ("cond", {k: v for k, v in self.conditions.items() if k != "label"}, _shapes(common.expect_cond)),
        ):
            if wanted not in ((), None, {}) and have != wanted:
                raise DataError(f"{self.manifest['name']}: {what} of the examples: {have}, but data.expect_{what} = {wanted}")
        self._cache = None
        count = self.manifest["count"]
        pixels, embeddings = self.numbers
        size = math.inf if count is None else count * (pixels * np.dtype(self.manifest["dtype"]).itemsize + 4 * embeddings)
        self.cached = size if size <= (CACHE_BYTES if room is None else room) else 0  # bytes
        if self.cached:
            self._cache = self._load(np.arange(count))
            if self.tokenizer:  # a caption that does not fit is met now, not after hours
                shown = slice(1 if self.common.captions == "first" else None)
                self.tokenizer([c for text in self._cache["caption"] for c in text.split("\n")[shown]], self.manifest["name"])

    @property
    def numbers(self) -> tuple[int, int]:
        """How many numbers an example has, and how many its embeddings have."""
        return math.prod(self.shape), sum(math.prod(shape) for shape in self.manifest.get("embeddings", {}).values())

    def _tokenizer(self):
        common = self.common
        if common.captions not in ("random", "first"):
            raise ConfigError(f"data.captions = {common.captions!r} is unknown; valid: random, first")
        if common.curriculum < 0 or (common.curriculum and common.captions == "first"):
            raise ConfigError(f"data.curriculum = {common.curriculum} is a number of examples, and for data.captions = 'random'")
        if not common.text:
            if common.curriculum or common.captions == "first":
                raise ConfigError("data.captions and data.curriculum choose among captions, which data.text turns into tokens")
            return None
        if "caption" not in self.manifest["columns"]:
            raise ConfigError(f"data.text is set, but {self.manifest['name']} has no captions")
        if "embedded" in self.manifest:
            raise ConfigError(f"data.text is set, but {self.manifest['name']} holds its captions embedded, and their tokenizer: leave it out")
        tokenizer = text_lib.build(common.text)
        self.manifest["tokenizer"] = {"vocab": tokenizer.vocab, "sha256": tokenizer.digest}
        return tokenizer

    def _final_shape(self) -> tuple[int, ...]:
        name, shape, dtype = (self.manifest[k] for k in ("name", "shape", "dtype"))
        pad, resize, flip = self.common.pad, self.common.resize, self.common.flip
        if pad < 0 or resize < 0:
            raise ConfigError(f"data.pad = {pad} and data.resize = {resize} must be sizes in pixels, or 0")
        if (pad or resize or flip) and (len(shape) != 3 or "latents" in self.manifest):
            what = "holds latents" if "latents" in self.manifest else f"has shape {tuple(shape)}"
            raise ConfigError(f"data.pad, resize and flip are for images; {name} {what}")
        if (pad or resize) and "z" in self.manifest["columns"]:
            raise ConfigError(f"data.pad and resize: {name} holds couplings, whose noise belongs to the size that they have")
        if resize:
            if dtype != "uint8":
                raise ConfigError(f"data.resize is for uint8 images; {name} holds {dtype}")
            shape = (resize, resize, shape[2])
        if None in shape:
            raise ConfigError(f"data.resize is missing: the images of {name} differ in size")
        if pad:
            if pad < max(shape[:2]):
                raise ConfigError(f"data.pad = {pad} is smaller than the images ({shape[0]} x {shape[1]})")
            shape = (pad, pad, shape[2])
        return tuple(shape)

    def _load(self, indices) -> dict[str, np.ndarray]:
        return self.transformed(self.source.read(indices), indices)

    def transformed(self, columns, indices) -> dict[str, np.ndarray]:
        """What a batch is made of, from the columns of the rows `indices` as the source reads them."""
        out = {}
        for key in columns.keys() & _PIXELS.keys():
            values = columns[key]
            lead = values.shape[:2] if key == "ranked" else ()
            values = values.reshape(-1, *values.shape[2:]) if lead else values
            if self.common.resize:
                values = [images.resize(v, self.common.resize) for v in values]
            values = np.asarray(values)
            values = images.pad(values, self.common.pad) if self.common.pad else values
            out[key] = values.reshape(*lead, *values.shape[1:]) if lead else values
        if "label" in columns:
            label = out["label"] = columns["label"]
            if bad := np.flatnonzero((label < 0) | (label >= self.num_classes)).tolist():
                raise DataError(
                    f"{self.manifest['name']} ({self.manifest['split']} row {indices[bad[0]]}): label {label[bad[0]]} is outside "
                    f"0..{self.num_classes - 1}"
                )
        for key in [*self.manifest.get("embeddings", {}), *{MARK} & columns.keys()]:
            out[key] = columns[key]
        if self.tokenizer:
            out["caption"] = np.array(columns["caption"], object)
        return out

    def rows(self, indices) -> dict[str, np.ndarray]:
        """Transformed columns of the rows `indices`, pixels still as stored."""
        return self._load(indices) if self._cache is None else {k: v[indices] for k, v in self._cache.items()}

    def stream(self, positions, seed: int, shuffle: bool) -> dict[str, np.ndarray]:
        """Rows at `positions` (n,) of this part's endless stream: epoch after epoch, each in an order of its own."""
        if self.source.endless:
            start = int(counter.make_key(seed, _ORDER)) % 2**62 if shuffle else 0
            indices = start + positions
        else:
            epochs, indices = np.divmod(positions, len(self.source))
            for epoch in np.unique(epochs) if shuffle else ():
                key = counter.make_key(seed, _ORDER, int(epoch))
                indices[epochs == epoch] = counter.permute(key, indices[epochs == epoch], len(self.source))
        out = dict(self.rows(indices))
        if self.tokenizer:
            out["text_ids" if self.textual else "tokens"] = self._tokens(out.pop("caption"), indices, positions, seed, self.common.curriculum if shuffle else 0)
        if self.common.flip:
            flipped = counter.uniform(counter.make_key(seed, _FLIP), positions) < 0.5
            for key in out.keys() & _PIXELS.keys():
                rows = flipped.reshape(-1, *(1,) * (out[key].ndim - 1))
                out[key] = np.where(rows, out[key][..., ::-1, :], out[key])
        return out

    def _tokens(self, captions, rows, positions, seed: int, curriculum: int) -> np.ndarray:
        """Token ids of one caption of each row; several are separated by new lines."""
        chance = counter.uniform(counter.make_key(seed, _CAPTION), positions)
        widening = np.minimum(1.0, (positions + 1) / curriculum) if curriculum else np.ones(len(positions))

        def choose(text, u, share):
            several = text.split("\n")
            if self.common.captions == "first" or len(several) == 1:
                return several[0]
            if share < 1:
                several = sorted(several, key=len)[: math.ceil(share * len(several))]
            return several[int(u * len(several))]

        chosen = [choose(*each) for each in zip(captions, chance, widening, strict=True)]
        return self.tokenizer(chosen, f"{self.manifest['name']} ({self.manifest['split']} rows {rows.min()} to {rows.max()})")


def _subset(source, classes, limit: int):
    """The source with the examples of some classes alone (all, if there are none), and with no more than `limit` of them (0:
    all)."""
    name, count = source.manifest["name"], source.manifest["num_classes"]
    if source.endless:
        raise ConfigError(f"data.classes and data.limit choose among the examples of a finite data set; {name} is endless")
    if limit < 0:
        raise ConfigError(f"data.limit = {limit} should be a number of examples, or 0 for all")
    rows = np.arange(len(source))
    if classes:
        if wrong := [c for c in classes if not isinstance(c, int) or not 0 <= c < count]:
            raise ConfigError(f"data.classes = {tuple(classes)}: {wrong[0]!r} is none of the {count} classes of {name}")
        labels = [source.read(rows[i : i + CHUNK])["label"] for i in range(0, len(rows), CHUNK)]
        rows = np.flatnonzero(np.isin(np.concatenate(labels), classes))
    rows = rows[: limit or None]
    if not len(rows):
        raise _Empty(f"{name} has no example of data.classes = {tuple(classes)}")
    manifest = source.manifest | {"count": len(rows)}
    return dataclasses.replace(source, manifest=manifest, read=lambda indices: source.read(rows[indices]))


def _finish(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for key in columns.keys() & _PIXELS.keys():
        value = columns[key]
        value, stored = value.astype(np.float32, copy=False), value.dtype
        batch[_PIXELS[key]] = value / np.float32(127.5) - np.float32(1) if stored == np.uint8 else value
    if MARK in columns:
        batch[MARK] = columns[MARK] != 0
    if "text_ids" in columns:
        batch["x"] = columns["text_ids"]
    batch["cond"] = {k: np.asarray(columns[k], dtype) for k, dtype in conditions.DTYPES.items() if k in columns}
    return batch


def interleave(positions, weights) -> tuple[np.ndarray, np.ndarray]:
    """(part, position within that part), each int64 (n,), for positions (n,) of a mixture.

    Two parts are interleaved evenly; of more, the last is split off, and so on. So any stretch holds each part in its share,
    give or take one row for each split, and no row of a part is skipped.
    """
    part = np.zeros(len(positions), np.int64)
    local = np.array(positions, np.int64)
    undecided = np.ones(len(positions), bool)
    for j in range(len(weights) - 1, 0, -1):
        share = weights[j] / sum(weights[: j + 1])
        before = np.floor(local * share).astype(np.int64)
        taken = undecided & (np.floor((local + 1) * share) > before)
        rest = undecided & ~taken
        part[taken], local[taken] = j, before[taken]
        local[rest] -= before[rest]
        undecided = rest
    return part, local


@dataclasses.dataclass
class _Batches:
    """Random access to this process's batches."""

    parts: list[_Part]
    weights: tuple[float, ...]
    whole: bool  # a batch is of one part
    batch_size: int
    seed: int
    process_index: int
    process_count: int
    shuffle: bool
    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, k: int) -> dict[str, Any]:
        rows = self.batch_size // self.process_count
        own = self.process_index * rows + np.arange(rows)
        if self.whole:
            part, batch = interleave(np.array([int(k)]), self.weights)
            part, local = np.repeat(part, rows), batch * self.batch_size + own
        else:
            part, local = interleave(int(k) * self.batch_size + own, self.weights)
        out: dict[str, np.ndarray] = {}
        for j in np.unique(part):
            mine = part == j
            seed = int(counter.make_key(self.seed, int(j)))
            columns = self.parts[j].stream(local[mine], seed, self.shuffle)
            if mine.all():
                out = columns
                break
            for key, value in columns.items():
                out.setdefault(key, np.empty((rows, *value.shape[1:]), value.dtype))[mine] = value
        marks = np.array([p.prior for p in self.parts])
        return _finish(out) | ({"prior": marks[part]} if marks.any() else {})


class Pipeline:
    """Iterator over batches; its whole state is the number of the next one.

    Properties: `manifest` describes the data, `num_classes` is 0 when unlabelled, `shape` is that of one example, `shapes` are those
    of all buckets (`shape`, that of most images, first), `dtype` is int32 where examples are texts, `conditions` are those of its condition by name (flowjax.conditions),
    `tokenizer` is None without `text`, the section that describes it.
    """

    def __init__(self, batches: _Batches, manifest: dict[str, Any], start: int):
        import grain

        first = batches.parts[0]
        self.manifest, self.num_classes, self.shape = manifest, first.num_classes, first.shape
        self.shapes = tuple(dict.fromkeys(p.shape for p in batches.parts))
        self.dtype = "int32" if first.textual else "float32"
        self.conditions, self.tokenizer, self.text = first.conditions, first.tokenizer, text_lib.resolved(first.common.text)
        size = 4 * sum(first.numbers) * batches.batch_size // batches.process_count
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=min(16, max(2, PREFETCH_BYTES // size)))
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        self.set_state({"next_index": start})

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        import grain

        return {"next_index": int(grain.experimental.get_next_index(self._iterator))}

    def set_state(self, state: Mapping[str, int]):
        import grain

        grain.experimental.set_next_index(self._iterator, int(state["next_index"]))


def _buckets(path, split: str) -> list[tuple[int, int]]:
    """Sizes of the buckets of a data set, that with the most images first."""
    manifest = records.read_manifest(path)
    found = records.sizes(manifest, split)
    if not found:
        have = [k for k in manifest["splits"] if records.sizes(manifest, k)]
        raise ConfigError(f"data.name = 'buckets': {path} has no buckets in split {split!r}; splits with buckets: {', '.join(have) or 'none'}")
    return sorted(found, key=lambda size: -found[size])


def _parts(section, split: str) -> tuple[list[_Part], tuple[float, ...], bool]:
    """(parts, weights, whether a batch is of one part)."""
    if section is None:
        raise ConfigError("no data: this network was converted, not trained here; say which data to use (--data)")
    name, settings = split_section(section, "data")
    if name == "buckets":
        if "path" not in settings or (settings.keys() & {"size", "resize", "pad"}):
            raise ConfigError("data.name = 'buckets' needs data.path, a data set made with --area, and no size, resize or pad: it takes all sizes as they are")
        if settings.get("limit"):
            raise ConfigError(f"data.limit = {settings['limit']} would be so many of each bucket; choose by data.classes, or prepare less")
        parts = _opened([{**settings, "name": "array_record", "size": size} for size in _buckets(settings["path"], split)], split, some=True)
        parts.sort(key=lambda part: -len(part.source))
        return parts, tuple(float(len(part.source)) for part in parts), True
    if name != "mixture":
        return _opened([section], split), (1.0,), False

    def mixture(parts: tuple, weights: tuple, prior: tuple = ()):
        return tuple(parts), tuple(float(w) for w in weights), tuple(prior)

    sections, weights, prior = mixture(**check(mixture, settings, "data"))
    if not sections or len(weights) != len(sections) or not all(0 < w < math.inf for w in weights):
        raise ConfigError(f"data.weights = {weights} must be {len(sections)} positive numbers, one for each of data.parts")
    if not {*prior} < {*range(len(sections))}:
        raise ConfigError(f"data.prior = {prior} must be numbers of some of the {len(sections)} data.parts, from 0, not of all")
    parts = _opened(sections, split)
    for i in prior:
        parts[i].prior = True

    def kind(p):
        columns = sorted({*p.manifest["columns"]} - {"caption"})
        return p.shape, p.manifest["dtype"], p.num_classes, columns, p.conditions, p.common.text, _makers(p.manifest)

    kinds = [kind(p) for p in parts]
    if any(k != kinds[0] for k in kinds):
        raise ConfigError(
            f"data.parts must agree in shape, dtype, classes, columns, text and who encoded them, but are {'; '.join(map(str, kinds))}"
        )
    return parts, weights, False


def _opened(sections, split: str, some: bool = False) -> list[_Part]:
    """Parts that share the memory for decoded data; some: without those of which data.classes leaves nothing."""
    parts: list[_Part] = []
    for i, section in enumerate(sections, 1):
        try:
            parts.append(_Part(section, split, CACHE_BYTES - sum(p.cached for p in parts)))
        except _Empty:
            if not some or (i == len(sections) and not parts):
                raise
    return parts


def _described(parts, weights, whole: bool) -> dict[str, Any]:
    """The manifest of one part, of buckets or of a mixture."""
    manifest = parts[0].manifest
    if whole:
        counts = {"x".join(map(str, p.manifest["shape"][:2])): p.manifest["count"] for p in parts}
        return manifest | {"count": sum(counts.values()), "buckets": counts}
    if len(parts) == 1:
        return manifest
    return {
        "name": "mixture",
        "split": manifest["split"],
        "count": None,
        "shape": list(parts[0].shape),
        "num_classes": parts[0].num_classes,
        "weights": list(weights),
        "parts": [p.manifest for p in parts],
    } | _marked(parts) | {k: v for k, v in manifest.items() if k == "tokenizer"} | _makers(manifest)  # the parts have the same


def _marked(parts) -> dict[str, Any]:
    """{"prior": numbers of the parts whose rows are marked}, where some are."""
    return {"prior": found} if (found := [i for i, p in enumerate(parts) if p.prior]) else {}


def _makers(manifest) -> dict[str, Any]:
    """Who made the latents and the embeddings of a data set, where it says so; no data and no places."""
    told = {"latents": ("vae",), "embedded": ("text", "section", "tokenizer")}
    return {k: {name: manifest[k].get(name) for name in names} for k, names in told.items() if k in manifest}


def pipeline(
    section: Mapping[str, Any] | str,
    batch_size: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    repeat: bool = True,
    start: int = 0,
) -> Pipeline:
    """The batches of a data section.

    **Arguments:** `section` has the name of a source (flowjax.data.sources.SOURCES), its settings, and pad, resize, flip; or
    name "mixture" with `parts` (sections), `weights` and `prior`, the numbers of the parts whose rows are marked in
    batch["prior"]; or name "buckets" with the `path` of a data set whose images differ in size: each batch is of one bucket,
    and every image is shown once before any of its bucket is shown again. `batch_size` is global; a process gets batch_size /
    process_count rows. With `shuffle`, each epoch has an order of its own. With `repeat` off the stream ends after one epoch,
    without the rows that do not fill a batch. `start` is the number of the first batch.

    **Errors:** ConfigError for settings, DataError (one of them) for data.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ConfigError(f"batch_size = {batch_size} must be a positive multiple of the number of processes, {process_count}")
    if not 0 <= process_index < process_count or start < 0:
        raise ConfigError(f"process_index = {process_index} must be in 0..{process_count - 1} and start = {start} not negative")
    parts, weights, whole = _parts(section, split)
    count = sys.maxsize
    if not repeat:
        if len(parts) > 1 or parts[0].source.endless:
            raise ConfigError("repeat = False is for one finite data set, not for a mixture, buckets or endless data")
        count = len(parts[0].source) // batch_size
        if not count:
            raise ConfigError(f"batch_size = {batch_size} is larger than the {len(parts[0].source)} examples of split {split!r}")
    batches = _Batches(parts, weights, whole, batch_size, seed, process_index, process_count, shuffle, count)
    return Pipeline(batches, _described(parts, weights, whole), start)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a section says of its data; stands in for a Pipeline where a program is compiled and not run."""

    shape: tuple[int, ...]
    num_classes: int
    conditions: Mapping[str, tuple[int, ...]]
    manifest: Mapping[str, Any]
    tokenizer: None = None
    dtype: str = "float32"

    @property
    def shapes(self):
        return (self.shape,)


def declared(section: Mapping[str, Any] | str) -> Declared:
    """The data that `expect_shape`, `expect_classes` and `expect_cond` promise, without looking for it."""
    name, settings = split_section(section, "data")
    promised = _Common(**{k: v for k, v in settings.items() if k.startswith("expect_")})
    if not promised.expect_shape or promised.expect_classes < 0:
        raise ConfigError("data.expect_shape and data.expect_classes are needed to plan without the data")
    shape, classes = tuple(promised.expect_shape), promised.expect_classes
    conditions = ({"label": ()} if classes else {}) | _shapes(promised.expect_cond)
    manifest = {"name": name, "shape": list(shape), "num_classes": classes, "declared": True}
    return Declared(shape, classes, conditions, manifest)


def ordered(section: Mapping[str, Any] | str, split: str, batch: int):
    """(manifest, iterator) over every example of a split once, in order, without flips: (rows, x, columns) of up to `batch`.

    x is float32 (n, ...) as in a batch; the columns (pixels, labels, captions, embeddings) are as they are stored, pixels after
    pad and resize. Of buckets, one comes after the other, and rows are counted in each.
    """
    parts, weights, whole = _parts(section, split)
    if (len(parts) > 1 and not whole) or parts[0].source.endless:
        raise ConfigError("data: one finite data set is needed, not a mixture or endless data")

    def batches():
        for part in parts:
            for start in range(0, len(part.source), batch):
                rows = np.arange(start, min(start + batch, len(part.source)))
                columns = part.source.read(rows)
                made = part.transformed(columns, rows)
                x = _finish(made).get("x")
                if x is None:
                    raise ConfigError(f"{part.manifest['name']} holds preference pairs or captions alone, not images or points")
                yield rows, x, columns | made

    return _described(parts, weights, whole), batches()


def arrays(section: Mapping[str, Any] | str, split: str = "train", limit: int | None = None, embedded: bool = True) -> dict[str, Any]:
    """All examples of a split in order (or the first `limit`) as one batch, without flips; for evaluators and small data.

    With `text`, "cond" has the tokens of each first caption, and "caption" lists all of them as they are stored. Without
    `embedded`, captions that are stored embedded are left out: they may be larger than the images.

    **Errors:** ConfigError for a mixture and for buckets, for endless data without `limit`, and for more than 4 GiB.
    """
    parts, _, whole = _parts(section, split)
    if whole:
        raise ConfigError("images of several sizes do not make one batch; take one bucket: data.name = 'array_record' with data.size = (height, width)")
    if len(parts) > 1:
        raise ConfigError("arrays of a mixture are not defined; ask for its parts")
    (part,) = parts
    if part.source.endless and limit is None:
        raise ConfigError(f"{part.manifest['name']} is endless; give a limit")
    count = limit if part.source.endless else min(limit or len(part.source), len(part.source))
    unwanted = () if embedded else part.manifest.get("embeddings", ())
    pixels, embeddings = part.numbers
    if (size := 4 * count * (pixels + embeddings * embedded)) > ARRAY_BYTES:
        raise ConfigError(f"{part.manifest['name']} {split} would take {size / 2**30:.1f} GiB in memory; give a limit")
    read = (part.rows(np.arange(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK))
    read = [{k: v for k, v in columns.items() if k not in unwanted} for columns in read]
    rows = {k: np.concatenate([columns[k] for columns in read]) for k in read[0]}
    if part.tokenizer:
        rows["text_ids" if part.textual else "tokens"] = part.tokenizer([c.split("\n")[0] for c in rows["caption"]], part.manifest["name"])
    return _finish(rows) | ({"caption": list(rows["caption"])} if part.tokenizer else {})
