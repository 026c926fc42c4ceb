"""A network of images on images too large for it, in overlapping tiles: for encoders and decoders of latents.

Tiles have one size and cover the image; the last of a row ends at the border and overlaps its neighbour as much as it takes. Where
tiles overlap they are blended by weights that fall linearly to their edges and sum to one, so that the result lies between what
the tiles say, moves from one to the other without a step, and is the network's own output where one tile covers the image.

Networks that look at the whole image (attention, group norms) answer a tile as if it were all there is. Blending hides the
difference, and does not remove it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flowjax.config import ConfigError


def starts(size: int, tile: int, overlap: int) -> np.ndarray:
    """Where tiles begin along an axis: as few as cover `size` with at least `overlap` between neighbours."""
    count = 1 + -(-max(0, size - tile) // (tile - overlap))
    return np.minimum(np.arange(count) * (tile - overlap), size - tile)


def weights(size: int, tile: int, at: np.ndarray) -> np.ndarray:
    """(tiles, tile): how much each tile counts at each of its positions; the sum over tiles is one everywhere.

    The ramp between two tiles is as long as what they share.
    """
    out = np.ones((len(at), tile))
    for i, shared in enumerate(at[:-1] + tile - at[1:]):
        ramp = (np.arange(shared) + 0.5) / shared
        out[i + 1, :shared] *= ramp
        out[i, tile - shared :] *= 1 - ramp
    # Where more than two overlap, the products do not sum to one.
    total = np.zeros(size)
    for i, start in enumerate(at):
        total[start : start + tile] += out[i]
    return out / np.stack([total[start : start + tile] for start in at])


def tiled(fn: Callable, x: jax.Array, tile: int, overlap: int) -> jax.Array:
    """fn(x), of images (B, H, W, C) -> (B, rH, rW, D) with a fixed ratio r, by tiles of `tile` positions of x along each side.

    **Arguments:** r is a whole number (decoders) or one over one (encoders), which then has to divide `tile`, `overlap`, H and W.
    One tile is computed after the other: memory is that of one.

    **Errors:** ConfigError where the sizes do not fit.
    """
    if not 0 <= overlap < tile:
        raise ConfigError(f"tiles of {tile} cannot overlap by {overlap}; valid: 0 to {tile - 1}")
    sides = x.shape[1:3]
    shape = tuple(min(tile, side) for side in sides)
    out = jax.eval_shape(fn, jax.ShapeDtypeStruct((x.shape[0], *shape, x.shape[3]), x.dtype))
    if out.shape[1] * shape[1] != out.shape[2] * shape[0] or any(max(a, b) % min(a, b) for a, b in zip(out.shape[1:3], shape)):
        raise ConfigError(f"tiles of {shape[0]} x {shape[1]} become {out.shape[1]} x {out.shape[2]}, which is no whole factor")

    def scaled(n):
        if n * out.shape[1] % shape[0]:
            raise ConfigError(f"tile = {tile}, overlap = {overlap} and sides of {sides[0]} x {sides[1]} must be multiples of {shape[0] // out.shape[1]}")
        return n * out.shape[1] // shape[0]

    axes = []
    for side, size in zip(sides, shape):
        at = starts(side, size, overlap if size < side else 0)
        made = np.array([scaled(int(start)) for start in at])
        axes.append((at, made, weights(scaled(side), scaled(size), made)))
    (rows, rows_out, by_row), (columns, columns_out, by_column) = axes
    grid = [np.ravel(v) for v in np.meshgrid(np.arange(len(rows)), np.arange(len(columns)), indexing="ij")]

    def one(total, cell):
        i, j = cell
        part = jax.lax.dynamic_slice(x, (0, jnp.asarray(rows)[i], jnp.asarray(columns)[j], 0), (x.shape[0], *shape, x.shape[3]))
        share = jnp.asarray(by_row, out.dtype)[i][:, None] * jnp.asarray(by_column, out.dtype)[j]
        place = (0, jnp.asarray(rows_out)[i], jnp.asarray(columns_out)[j], 0)
        new = jax.lax.dynamic_slice(total, place, out.shape) + share[..., None] * fn(part)
        return jax.lax.dynamic_update_slice(total, new, place), None

    whole = jnp.zeros((x.shape[0], *(scaled(side) for side in sides), out.shape[3]), out.dtype)
    return jax.lax.scan(one, whole, tuple(jnp.asarray(v) for v in grid))[0]
