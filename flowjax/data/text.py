"""Captions -> token ids (n, length) int32, on the host.

    {"name": "bytes", "length": 64}                                      UTF-8 bytes + 1: no file, any language
    {"name": "file", "path": "tokenizer.json", "length": 77}             a file of the `tokenizers` library (extra `text`)
    {"name": "joined", "parts": [section, section]}                      one after the other: several encoders, each with its own
    {"name": "export", "path": "exports/sd3_text"}                       that of a text encoder's export, or of any network's

Rows are padded at the end, so every batch has one shape. A caption that is too long is refused, or cut where `truncate` says so:
never in silence. `added` = {word: number} gives new words so many tokens each, behind the vocabulary (flowjax.train.inversion). With
`pairs`, what stands before and after a tab are two texts, the second behind the first with a padding token between: for language models
that go on from one to the other.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flowjax import storage
from flowjax.config import ConfigError, build as build_section, keywords
from flowjax.data.records import DataError

FILE = "tokenizer.json"  # what an export or a data set calls the file of its tokenizer
PADDING = "[PAD]"  # token 0 of a tokenizer that is learned here


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """encode(list of strings) -> lists of ids; decode(ids) -> string, up to the first `pad`. vocab: ids are 0 .. vocab - 1, `pad`
    among them. file: what it was read from. added: words that got tokens of their own, behind all others, and how many each."""

    encode: Callable[[list[str]], list[list[int]]]
    vocab: int
    length: int
    pad: int = 0
    truncate: bool = False
    file: pathlib.Path | None = None
    pairs: bool = False
    decode: Callable[[list[int]], str] | None = None
    added: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """[length]: one number for each tokenizer of a Joined."""
        return [self.length]

    @property
    def files(self) -> dict[str, pathlib.Path]:
        """{name under which an export or a data set keeps it: the file it was read from}."""
        return {FILE: self.file} if self.file else {}

    def __call__(self, texts: Sequence[str], where: str = "") -> np.ndarray:
        """int32 (n, length). **Errors:** DataError that quotes a text which does not fit and, as `where`, says whose it is."""
        out = np.full((len(texts), self.length), self.pad, np.int32)
        for row, text, ids in zip(out, texts, self._ids(list(texts), where), strict=True):
            if len(ids) > self.length and not self.truncate:
                raise DataError(
                    f"{where + ': ' if where else ''}{text!r} has {len(ids)} tokens, but text.length = {self.length}; "
                    "raise it, or set text.truncate"
                )
            row[: len(ids)] = ids[: self.length]
        return out

    def fits(self, text: str) -> bool:
        """Whether nothing of a text would be refused."""
        return len(self.encode([text])[0]) <= self.length

    def _ids(self, texts: list[str], where: str):
        if not self.pairs:
            return self.encode(texts)
        halves = [text.split("\t") for text in texts]
        if odd := [text for text, half in zip(texts, halves) if len(half) != 2]:
            raise DataError(f"{where + ': ' if where else ''}{odd[0]!r} should be two texts with a tab between (text.pairs)")
        first, second = (self.encode([half[i] for half in halves]) for i in (0, 1))
        return [[*a, self.pad, *b] for a, b in zip(first, second)]

    @property
    def digest(self) -> str:
        """sha256 of the file, or "" where there is none."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest() if self.file else ""


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several tokenizers of the same text, for encoders that stand side by side (flowjax.models.text_encoders): the ids of the first,
    then those of the second, in one row. vocab and lengths have one number for each."""

    parts: tuple[Tokenizer, ...]
    pad = 0
    file = None

    def __call__(self, texts: Sequence[str], where: str = "") -> np.ndarray:
        return np.concatenate([part(texts, where) for part in self.parts], axis=1)

    def fits(self, text: str) -> bool:
        return all(part.fits(text) for part in self.parts)

    @property
    def vocab(self) -> list[int]:
        return [part.vocab for part in self.parts]

    @property
    def lengths(self) -> list[int]:
        return [part.length for part in self.parts]

    @property
    def length(self) -> int:
        return sum(self.lengths)

    @property
    def files(self) -> dict[str, pathlib.Path]:
        return {_numbered(i): part.file for i, part in enumerate(self.parts) if part.file}

    @property
    def digest(self) -> str:
        digests = [part.digest for part in self.parts]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest() if any(digests) else ""


def mismatch(tokenizer, vocab, lengths=None) -> str:
    """What keeps text encoders with these vocabularies and lengths (numbers, or lists of them) from reading the ids of a tokenizer,
    or ""."""
    knows, has = (list(v) if isinstance(v, list | tuple) else [v] for v in (vocab, tokenizer.vocab))
    if len(knows) != len(has):
        return f"{len(knows)} text encoder{'s' * (len(knows) > 1)}, but {len(has)} tokenizer{'s' * (len(has) > 1)}"
    if lengths is not None and [*lengths] != tokenizer.lengths:
        return f"text encoders of {[*lengths]} tokens, but tokenizers that make {tokenizer.lengths}"
    if less := [(k, h) for k, h in zip(knows, has) if k < h]:
        return f"a text encoder of vocab = {less[0][0]}, but the tokenizer has {less[0][1]} tokens"
    return ""


def _added(added: Mapping[str, int], vocab: int) -> dict[str, list[int]]:
    """{word: its ids}, behind the vocabulary."""
    fit = lambda word, n: isinstance(word, str) and word.strip() == word != "" and isinstance(n, int) and n > 0  # noqa: E731
    if not isinstance(added, Mapping) or not all(fit(*item) for item in added.items()):
        raise ConfigError(f"text.added = {added!r} should say how many tokens each new word gets: {{word: number}}")
    ends = list(itertools.accumulate(added.values(), initial=vocab))
    return {word: list(range(a, b)) for word, a, b in zip(added, ends, ends[1:])}


def _with_words(encode: Callable, words: Mapping[str, list[int]], pieces: Callable[[str], str]) -> Callable:
    """encode, between the words that have ids of their own; pieces: what is encoded of the text between them."""
    if not words:
        return encode
    between = re.compile("(" + "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ")")

    def one(text: str) -> list[int]:
        ids: list[int] = []
        for piece in between.split(text):
            ids += words[piece] if piece in words else encode([rest])[0] if (rest := pieces(piece)) else []
        return ids

    return lambda texts: [one(text) for text in texts]


def _bytes(length: int, truncate: bool = False, pairs: bool = False, added: Mapping = {}) -> Tokenizer:  # noqa: B006
    """UTF-8 bytes shifted by one; a caption cut inside a character loses its last bytes only."""
    encode = lambda texts: [[b + 1 for b in text.encode()] for text in texts]  # noqa: E731
    decode = lambda ids: bytes(i - 1 for i in _before(ids, 0) if i < 257).decode(errors="replace")  # noqa: E731
    words = _added(added, 257)
    encode = _with_words(encode, words, lambda piece: piece)
    vocab = 257 + sum(added.values())
    return Tokenizer(encode, vocab, _length(length), truncate=truncate, pairs=pairs, decode=decode, added=added)


def _file(path: str, length: int, pad: int = 0, truncate: bool = False, pairs: bool = False, added: Mapping = {}) -> Tokenizer:  # noqa: B006
    """A tokenizer.json, with the special tokens that its own post-processor adds; `pad` is the id to pad with."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("text.name = 'file' needs the tokenizers library: pip install 'flowjax[text]'") from None
    file = storage.path(path)
    if not file.is_file():
        raise DataError(f"text.path = {path!r}: no such file")
    try:
        inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"{file} is not a file of the tokenizers library ({error})") from None
    inner.no_truncation()  # both are done here, where they are seen
    inner.no_padding()
    if truncate:  # by the library, which cuts words and keeps the special tokens around them
        inner.enable_truncation(_length(length))
    vocab = inner.get_vocab_size()
    if not 0 <= pad < vocab:
        raise ConfigError(f"text.pad = {pad} is outside the vocabulary, 0..{vocab - 1}")
    decode = lambda ids: inner.decode(_before(ids, pad)).strip()  # noqa: E731
    encode = lambda texts: [e.ids for e in inner.encode_batch(texts)]  # noqa: E731
    words = _added(added, vocab)
    if words and encode([""]) != [[]]:
        raise ConfigError(f"text.added: {file} puts tokens of its own around every text, between which a new word has no place")
    encode = _with_words(encode, words, str.strip)
    vocab += sum(added.values())
    return Tokenizer(encode, vocab, _length(length), pad, truncate, file, pairs, decode, added)


def _before(ids: list[int], end: int) -> list[int]:
    """The ids before the first `end`."""
    return ids[: ids.index(end)] if end in ids else ids


def _length(length: int) -> int:
    if length < 1:
        raise ConfigError(f"text.length = {length} should be at least 1")
    return length


def _joined(parts: tuple) -> Joined:
    if len(parts) < 2:
        raise ConfigError(f"text.parts = {parts!r} should be at least two sections of tokenizers")
    built = tuple(build(part, f"text.parts[{i}]") for i, part in enumerate(parts))
    if any(isinstance(part, Joined) for part in built):
        raise ConfigError("text.parts are single tokenizers, none of them joined")
    return Joined(built)


def _export(path: str):
    return build(resolved({"name": "export", "path": path}), "text")


TOKENIZERS = {"bytes": _bytes, "file": _file, "joined": _joined, "export": _export}


def _numbered(i: int) -> str:
    return FILE.replace(".", f"_{i}.")


def resolved(section):
    """The section of a tokenizer, that of an export replaced by what stands there, files and all."""
    if section and keywords(section)["name"] == "joined" and "parts" in section:
        return {**section, "parts": [resolved(part) for part in section["parts"]]}
    if not section or keywords(section)["name"] != "export":
        return section
    folder = storage.path(keywords(section).get("path", ""))
    try:
        found = json.loads((folder / "config.json").read_text()).get("text")
    except (OSError, json.JSONDecodeError):
        raise ConfigError(f"text.path = {str(folder)!r} is neither an export nor a workdir: it has no config.json to read") from None
    if not found:
        raise ConfigError(f"text.path = {str(folder)!r} is an export without a tokenizer")
    return kept(found, folder)


def stored(section, folder) -> dict:
    """A tokenizer's section whose files are those that were written to the folder, under the names of `Tokenizer.files`."""

    def placed(part, name):
        part = keywords(part)
        return {**part, "path": str(folder / name)} if part["name"] == "file" else part

    section = keywords(section)
    if section["name"] == "joined":
        return {**section, "parts": [placed(part, _numbered(i)) for i, part in enumerate(section["parts"])]}
    return placed(section, FILE)


def kept(section, folder) -> dict:
    """`stored` where the files are there (an export); the section as it is where they are not (a workdir, which names its own)."""
    own = stored(section, folder)
    paths = [part.get("path") for part in map(keywords, own.get("parts", [own]))]
    return own if all(path is None or (folder / path.rpartition("/")[2]).exists() for path in paths) else keywords(section)


def placeless(section) -> dict:
    """A tokenizer's section without the places of its files."""
    section = {k: v for k, v in keywords(section).items() if k != "path"}
    return section | ({"parts": [placeless(part) for part in section["parts"]]} if "parts" in section else {})


def captions(path: str, split: str) -> list[str]:
    """Every caption of a split."""
    from flowjax.data import records

    reader = records.Records(path, split)
    if "caption" not in reader.manifest["features"]:
        raise ConfigError(f"{path} has no captions")
    parts = np.array_split(np.arange(len(reader)), -(-len(reader) // 1024))  # a record holds its image too
    return [c for part in parts for text in reader.read(part, ("caption",))["caption"] for c in text.split("\n")]


def learn(texts: list[str], vocab: int):
    """A tokenizers.Tokenizer: BPE over UTF-8 bytes, words with the space before them, PADDING as token 0."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("this needs the tokenizers library: pip install 'flowjax[text]'") from None
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=vocab, special_tokens=[PADDING], initial_alphabet=alphabet, show_progress=False)
    )
    return model


def without(section) -> dict:
    """A data section whose captions are not turned into tokens."""
    return {k: v for k, v in keywords(section).items() if k not in ("text", "captions", "curriculum")}


def build(section, where: str = "data.text") -> Tokenizer:
    """The tokenizer that a section describes."""
    return build_section(TOKENIZERS, section, where)
