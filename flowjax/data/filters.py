"""What is left out of a data set before anything else is done with it: too small, too long or short a caption, seen already.

A filter takes an example, {"image": uint8 (H, W, C), "caption": captions on a line each, ...}, and says whether to keep it: what
grain's own MapDataset.filter takes. `duplicates` remembers what it kept, so its examples have to come in order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flowjax.config import ConfigError
from flowjax.data.records import DataError

BITS = 64  # of a perceptual hash


def smallest_side(pixels: int) -> Callable[[Mapping[str, Any]], bool]:
    """Images whose sides are both at least `pixels`."""
    return lambda example: min(example["image"].shape[:2]) >= pixels


def caption_words(least: int, most: int) -> Callable[[Mapping[str, Any]], bool]:
    """Images whose captions all have least..most words; most = 0 for any number."""

    def keep(example):
        if "caption" not in example:
            raise DataError("--caption_words: the images have no captions")
        return all(least <= len(c.split()) <= (most or np.inf) for c in example["caption"].split("\n"))

    return keep


def dhash(image: np.ndarray) -> int:
    """Difference hash: 64 bits that say, on 8 rows of 9 grey pixels, where the right neighbour is brighter."""
    from PIL import Image

    from flowjax.data import images

    grey = Image.fromarray(images.convert(image, 1)[..., 0]).resize((9, 8), Image.Resampling.LANCZOS)
    pixels = np.asarray(grey, np.int16)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


def duplicates(distance: int) -> Callable[[Mapping[str, Any]], bool]:
    """Images whose difference hash has more than `distance` bits unlike those of every image kept before."""
    if not 0 <= distance < BITS:
        raise ConfigError(f"--duplicates = {distance} should be a number of bits, 0 to {BITS - 1}")
    # Of distance + 1 pieces of the hash, one is the same in any two hashes that differ in no more than `distance` bits.
    edges = np.linspace(0, BITS, distance + 2).astype(int).tolist()
    seen: list[dict[int, list[int]]] = [{} for _ in edges[1:]]

    def keep(example):
        mine = dhash(example["image"])
        pieces = [(mine >> a) % (1 << (b - a)) for a, b in zip(edges, edges[1:])]
        if any((mine ^ other).bit_count() <= distance for found, piece in zip(seen, pieces) for other in found.get(piece, ())):
            return False
        for found, piece in zip(seen, pieces):
            found.setdefault(piece, []).append(mine)
        return True

    return keep


def apply(examples: Iterable, filters: Mapping[str, Callable], dropped: dict[str, int]) -> Iterator:
    """The (split, where, example) that all filters keep; dropped[name] counts those that each, in turn, did not."""
    dropped.update(dict.fromkeys(filters, 0))
    for split, where, example in examples:
        reason = next((name for name, keep in filters.items() if not keep(example)), None)
        if reason is None:
            yield split, where, example
        else:
            dropped[reason] += 1
