"""Latents and embeddings made once: the examples of a data section through frozen encoders, as records (flowjax.data.records).

A record holds "x", the standardised posterior mean that an autoencoder's codec gives (flowjax.train.roles.Latents), or "text" and
"pooled", what a text encoder makes of the caption, or all three: what a run would otherwise compute at every step. Labels,
captions and what was encoded before come along as they were; without an autoencoder so do the pixels, resized and padded. Where
the section flips images by chance, each training image has two records, its own and its mirror image's: a mirrored latent is not
the latent of the mirror image.

A record has one caption's embeddings. Where images have several captions the section has to say captions = "first".

The manifest says what was encoded, and by whom. Each `key` is a hash of all that: data, transforms, encoder, tokenizer, format
and version of the code. A run refuses latents whose autoencoder is not its roles.vae, and embeddings whose text encoder is not
its roles.text. The tokenizer's file is kept beside the records, for prompts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import flowjax
from flowjax import storage
from flowjax.config import ConfigError, keywords
from flowjax.data import records, text as text_lib
from flowjax.data.pipeline import ordered

DTYPES = ("float16", "float32")
MADE = ("latents", "embedded")  # in a manifest's source; a second encoding carries what the first says along


class Encoder(NamedTuple):
    """A frozen network: the function, and the hash of the network behind it (flowjax.train.export.identity).

    An autoencoder maps images (batch, H, W, C) float32 in [-1, 1] to latents (batch, h, w, Z); a text encoder maps token ids
    (batch, L), each less than `vocab`, to ("text" (batch, S, D), "pooled" (batch, P)); of several encoders side by side vocab and
    `lengths` (which add up to L) are lists.
    """

    apply: Callable
    identity: str
    vocab: int | list[int] = 0
    lengths: list[int] | None = None


def write(
    out, section, vae: Encoder | None = None, text: Encoder | None = None, *,
    splits: Sequence[str] = ("train", "test"), dtype: str = "float16", tile: int = 0, batch: int = 64,
    overwrite: bool = False, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write the latents or the embedded captions of a data section's splits, or both, to the directory `out`; returns the manifest.

    **Arguments:** `vae` encodes images, in tiles of `tile` pixels (0: whole ones), `text` captions, as ids of the section's
    tokenizer `text`; `batch` of them at a time. `dtype` is that of what is encoded.

    Nothing is encoded where the same is there already. **Errors:** ConfigError for settings and where other data are
    there (without `overwrite`), DataError for damaged data.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype = {dtype!r} is unknown; valid: {', '.join(DTYPES)}")
    if batch < 1:
        raise ConfigError(f"--batch = {batch} should be at least 1")
    if not (vae or text):
        raise ConfigError("nothing to encode with: give an autoencoder, a text encoder, or both")
    captions, section = keywords(section), text_lib.without(section)  # captions come along as they are, whatever is made of them
    opened = {split: ordered(section, split, batch) for split in splits}
    if not opened:
        raise ConfigError("--splits names none")
    manifest = next(iter(opened.values()))[0]
    flip = bool(section.get("flip"))
    about = {"dtype": dtype, "data": {k: _content(m) for k, (m, _) in opened.items()}, "code_version": flowjax.__version__}
    source = {k: manifest[k] for k in MADE if k in manifest}
    tokenizer = _tokenizer(captions, manifest, text) if text else None
    if vae:
        if "latents" in manifest:
            raise ConfigError(f"{manifest['name']} holds latents already")
        source["latents"] = _signed({"vae": vae.identity, "flip": flip, "tile": tile, **about}) | {"section": section}
    elif flip or tile:
        raise ConfigError("data.flip and --tile are for latents: pixels are kept as they are, and the run that reads them flips them")
    if text:
        told = text_lib.placeless(text_lib.resolved(captions["text"]))
        known = {"vocab": tokenizer.vocab, "sha256": tokenizer.digest}
        source["embedded"] = _signed({"text": text.identity, "section": told, "tokenizer": known, **about})
    if (found := _there(out)) and _keys(found["source"]) == _keys(source) and not records.damaged(out, found):
        return found

    def encoded(x, split):
        """[columns] of images: their own, and those of their mirror images where they have any."""
        return [{"x": _padded(vae.apply, v, batch)} for v in ([x, x[:, :, ::-1]] if flip and split == "train" else [x])]

    def embedded(texts, where):
        if several := [c for c in texts if "\n" in c and captions.get("captions") != "first"]:
            raise ConfigError(f"{where}: {several[0]!r} are several captions, of which one is embedded: set data.captions = 'first'")
        ids = tokenizer([c.split("\n")[0] for c in texts], where)
        return dict(zip(("text", "pooled"), _padded(text.apply, ids, batch), strict=True))

    def examples() -> Iterator[tuple[str, str, dict[str, Any]]]:
        for split, (read, batches) in opened.items():
            for rows, x, columns in batches:
                where = f"{read['name']} ({split} row"
                ways = encoded(x, split) if vae else [{}]
                words = embedded(columns["caption"], f"{where}s {rows[0]} to {rows[-1]})") if text else {}
                kept = {k: v for k, v in columns.items() if not (vae and k in ("image", "x"))}
                for i, row in enumerate(rows):
                    for way in ways:
                        new = {k: v[i].astype(dtype) for k, v in {**way, **words}.items()}
                        if bad := [k for k, v in new.items() if not np.isfinite(v).all()]:
                            what = "latent" if bad[0] == "x" else "embedding"
                            raise records.DataError(f"{where} {row}): its {what} is not finite in {dtype}")
                        yield split, f"{where} {row})", {**{k: v[i] for k, v in kept.items()}, **new}

    return records.write(
        out, examples(), name=f"{manifest['name']}_{'latents' if vae else 'embedded'}", num_classes=manifest["num_classes"],
        class_names=manifest.get("class_names", ()), source=source, command=command, overwrite=overwrite,
        files=_file(tokenizer, manifest), buckets="buckets" in manifest,
    )  # fmt: skip


def _tokenizer(section, manifest, encoder: Encoder):
    """The tokenizer of the captions to embed; ConfigError where that cannot be done."""
    if "embeddings" in manifest:
        raise ConfigError(f"{manifest['name']} holds embeddings already")
    if "caption" not in manifest["columns"]:
        raise ConfigError(f"{manifest['name']} has no captions to embed")
    if not section.get("text"):
        raise ConfigError("captions are embedded as tokens: data.text has to say by which tokenizer")
    if section.get("captions", "random") not in ("random", "first") or section.get("curriculum"):
        raise ConfigError("one caption of an image is embedded: data.captions can be 'first', and there is no data.curriculum")
    tokenizer = text_lib.build(section["text"])
    if wrong := text_lib.mismatch(tokenizer, encoder.vocab, encoder.lengths):
        raise ConfigError(f"data.text does not fit: {wrong}")
    return tokenizer


def _file(tokenizer, manifest) -> dict[str, bytes]:
    """The files of the tokenizer, or of that with which captions were embedded before."""
    if tokenizer is None and manifest.get("tokenizer", {}).get("sha256"):
        tokenizer = text_lib.build(text_lib.stored(manifest["embedded"]["section"], storage.path(manifest["path"])))
    return {name: file.read_bytes() for name, file in tokenizer.files.items()} if tokenizer else {}


def _signed(made: dict[str, Any]) -> dict[str, Any]:
    return {**made, "key": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()}


def _keys(source: Mapping[str, Any]) -> dict[str, Any]:
    return {k: source[k].get("key") for k in MADE if k in source}


def _content(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the data themselves: not where they lie."""
    return {k: v for k, v in manifest.items() if k not in ("path", *MADE)} | _keys(manifest)


def _there(out):
    """The manifest of the data set at `out`, or None."""
    try:
        return records.read_manifest(out)
    except records.DataError:
        return None


def _padded(encode: Callable, x: np.ndarray, batch: int):
    """encode(x), an array or a tuple of them, by a function compiled for `batch` rows."""
    rows = np.minimum(np.arange(batch), len(x) - 1)
    out = encode(x[rows])
    return tuple(np.asarray(v)[: len(x)] for v in out) if isinstance(out, tuple) else np.asarray(out)[: len(x)]
