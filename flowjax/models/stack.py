"""A stack of equal layers, scanned or unrolled, from which the states after some of them can be read."""

import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.config import ConfigError
from flowjax.models.attention import SEEN
from flowjax.models.remat import REMAT

# Names of scanned stacks, in the order in which those of one network follow each other.
NAMES = ("dual_blocks", "blocks", "double_blocks", "context_blocks", "single_blocks")
UNROLLED = "unrolled"


def stack(layer: type[nn.Module], fields: tuple, length: int, *, name="blocks", first=0, scan=True, remat="none", taps=(), each=None):
    """The function (h, *inputs) -> (h after all layers, {layer: h after it}), for the compact method of a network.

    layer(*fields) maps (h, *inputs) to (h, None); h is an array or a tree of them. Scanned layers (scan = True) share one parameter
    `name` with a leading axis. So do those of scan = "unrolled", whose loop is written out in the program: it takes longer to compile,
    and nothing that the backward pass reads is copied into stacks of all layers and out again, which costs GPUs a tenth of a step. With
    scan = False they are "block_<first>", "block_<first + 1>", ... taps: numbers of the layers to read, counted from 1 at the network's
    first, of which this stack begins behind `first`; others are for other stacks. each: a tree of arrays (length, ...), of which a layer
    gets its row as the last input.
    """
    if scan not in (True, False, UNROLLED):
        raise ConfigError(f"model.scan = {scan!r} is unknown; valid: True, False, {UNROLLED!r}")
    if remat != "none":
        layer = nn.remat(layer, prevent_cse=not scan, policy=REMAT[remat])
    taps = sorted({tap for tap in taps if first < tap <= first + length})
    if not scan:

        def run(h, *inputs):
            kept = {}
            for i in range(length):
                row = () if each is None else (jax.tree.map(lambda v, i=i: v[i], each),)
                h, _ = layer(*fields, name=f"block_{first + i}")(h, *inputs, *row)
                kept |= {first + i + 1: h} if first + i + 1 in taps else {}
            return h, kept

        return run

    def body(block, carry, number, row, *inputs):
        h, kept = carry
        h, _ = block(h, *inputs, *row)
        # Each in the carry costs one select per layer and memory for one state; the scan's outputs would hold those of all layers.
        kept = {tap: jax.tree.map(lambda new, old, tap=tap: jnp.where(number == tap, new, old), h, old) for tap, old in kept.items()}
        return (h, kept), None

    def scanned(h, *inputs):
        run = nn.scan(
            body,
            length=length,
            in_axes=(0, 0, *(nn.broadcast,) * len(inputs)),
            variable_axes={"params": 0, SEEN: 0},
            split_rngs={"params": True, "dropout": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
            unroll=length if scan == UNROLLED else 1,
        )
        numbers = first + jnp.arange(1, length + 1) if taps else None
        (h, kept), _ = run(layer(*fields, name=name), (h, dict.fromkeys(taps, h)), numbers, () if each is None else (each,), *inputs)
        return h, kept

    return scanned


def layer_numbers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | range, int]]:
    """{name: (number of its layer, depth)} of the parameters that belong to layers, by names and shapes of all of a network.

    Layers count from 0 at the input, through all stacks of one scope (a network, or its text encoder), whether scanned or not;
    a scanned parameter has a range of numbers, one for each row of its leading axis.
    """
    found = {k: m for k in shapes if (m := re.search(rf"(?:^|/)(?:({'|'.join(NAMES)})|block_(\d+))/", k))}
    lengths: dict[str, dict[str, int]] = {}  # of the scanned stacks, by scope
    for name, match in found.items():
        if match[1]:
            lengths.setdefault(name[: match.start()], {})[match[1]] = shapes[name][0]
    numbers: dict[str, int | range] = {}
    depth: dict[str, int] = {}
    for name, match in found.items():
        scope, first = name[: match.start()], int(match[2] or 0)
        if match[1]:
            first = sum(lengths[scope].get(k, 0) for k in NAMES[: NAMES.index(match[1])])
        stop = first + (shapes[name][0] if match[1] else 1)
        numbers[name] = range(first, stop) if match[1] else first
        depth[scope] = max(stop, depth.get(scope, 0))
    return {name: (at, depth[name[: found[name].start()]]) for name, at in numbers.items()}
