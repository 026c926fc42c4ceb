"""A stack of equal layers, scanned or unrolled, from which the state after one of them can be read."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowjax.models.attention import SEEN
from flowjax.models.remat import REMAT


def stack(layer: type[nn.Module], fields: tuple, length: int, *, name="blocks", first=0, scan=True, remat="none", tap=0, each=None):
    """The function (h, *inputs) -> (h after all layers, h after layer `tap`), for the compact method of a network.

    layer(*fields) maps (h, *inputs) to (h, None); h is an array or a tree of them. Scanned layers share one parameter `name`
    with a leading axis; unrolled ones are "block_<first>", "block_<first + 1>", ... `tap` counts layers from 1; 0 reads
    nothing, returns None and costs nothing. each: a tree of arrays (length, ...), of which a layer gets its row as the last input.
    """
    if remat != "none":
        layer = nn.remat(layer, prevent_cse=not scan, policy=REMAT[remat])
    if not scan:

        def run(h, *inputs):
            kept = None
            for i in range(length):
                row = () if each is None else (jax.tree.map(lambda v, i=i: v[i], each),)
                h, _ = layer(*fields, name=f"block_{first + i}")(h, *inputs, *row)
                kept = h if i + 1 == tap else kept
            return h, kept

        return run

    def body(block, carry, number, row, *inputs):
        h, kept = carry
        h, _ = block(h, *inputs, *row)
        if tap:
            # The carry costs one select per layer and memory for one state; the scan's outputs would hold all of them.
            kept = jax.tree.map(lambda new, old: jnp.where(number == tap, new, old), h, kept)
        return (h, kept), None

    def scanned(h, *inputs):
        run = nn.scan(
            body,
            length=length,
            in_axes=(0, 0, *(nn.broadcast,) * len(inputs)),
            variable_axes={"params": 0, SEEN: 0},
            split_rngs={"params": True, "dropout": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        numbers = jnp.arange(1, length + 1) if tap else None
        (h, kept), _ = run(layer(*fields, name=name), (h, h if tap else None), numbers, () if each is None else (each,), *inputs)
        return h, kept

    return scanned
