"""Latents made once: the examples of a data section through a frozen autoencoder, as records (flowjax.data.records).

A record holds "x", the standardised posterior mean that the autoencoder's codec gives (flowjax.train.roles.Latents) and a run
would otherwise compute at every step, and the example's label, captions and embeddings as they were. Where the section flips
images by chance, each training image has two records, its own and its mirror image's: a mirrored latent is not the latent of the
mirror image.

The manifest says what the latents are of and who made them. `key` is a hash of all that: data, transforms, autoencoder, format and
version of the code. A run refuses latents whose autoencoder is not its roles.vae.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import flowjax
from flowjax.config import ConfigError
from flowjax.data import records, text
from flowjax.data.pipeline import ordered

DTYPES = ("float16", "float32")


def write(
    out, section, encode: Callable, vae: str, *,
    splits: Sequence[str] = ("train", "test"), dtype: str = "float16", tile: int = 0, batch: int = 64,
    overwrite: bool = False, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Write the latents of a data section's splits to the directory `out`; returns the manifest.

    **Arguments:** `encode` maps images (batch, H, W, C) float32 in [-1, 1] to latents (batch, h, w, Z); `vae` is the hash of the
    autoencoder behind it (flowjax.train.export.identity), `tile` the size of tiles that it works in (0: the whole image); `batch`
    images are encoded at a time.

    Nothing is encoded where the same latents are there already. **Errors:** ConfigError for settings and where other data are
    there (without `overwrite`), DataError for damaged data.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype = {dtype!r} is unknown; valid: {', '.join(DTYPES)}")
    if batch < 1:
        raise ConfigError(f"--batch = {batch} should be at least 1")
    section = text.without(section)  # captions are carried along as they are, for whatever tokenizer comes later
    opened = {split: ordered(section, split, batch) for split in splits}
    if not opened:
        raise ConfigError("--splits names none")
    manifest = next(iter(opened.values()))[0]
    if "latents" in manifest:
        raise ConfigError(f"{manifest['name']} holds latents already")
    flip = bool(section.get("flip"))
    known = {k: _without_place(m) for k, (m, _) in opened.items()}
    latents = {"vae": vae, "flip": flip, "dtype": dtype, "tile": tile, "data": known, "code_version": flowjax.__version__}
    latents["key"] = hashlib.sha256(json.dumps(latents, sort_keys=True).encode()).hexdigest()
    latents["section"] = section
    if (found := _there(out)) and found["source"].get("latents", {}).get("key") == latents["key"] and not records.damaged(out, found):
        return found

    def examples() -> Iterator[tuple[str, str, dict[str, Any]]]:
        for split, (about, batches) in opened.items():
            for rows, x, others in batches:
                both = [_padded(encode, v, batch).astype(dtype) for v in ([x, x[:, :, ::-1]] if flip and split == "train" else [x])]
                for i, row in enumerate(rows):
                    where = f"{about['name']} ({split} row {row})"
                    for z in both:
                        if not np.isfinite(z[i]).all():
                            raise records.DataError(f"{where}: its latent is not finite in {dtype}")
                        yield split, where, {"x": z[i], **{k: v[i] for k, v in others.items()}}

    about = {"num_classes": manifest["num_classes"], "class_names": manifest.get("class_names", ()), "buckets": "buckets" in manifest}
    source = {"latents": latents}
    return records.write(out, examples(), name=f"{manifest['name']}_latents", source=source, command=command, overwrite=overwrite, **about)


def _without_place(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the data themselves: not where they lie."""
    return {k: v for k, v in manifest.items() if k != "path"}


def _there(out):
    """The manifest of the data set at `out`, or None."""
    try:
        return records.read_manifest(out)
    except records.DataError:
        return None


def _padded(encode: Callable, x: np.ndarray, batch: int) -> np.ndarray:
    """encode(x) by a function compiled for `batch` rows."""
    rows = np.minimum(np.arange(batch), len(x) - 1)
    return np.asarray(encode(x[rows]))[: len(x)]
