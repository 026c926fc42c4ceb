"""Counter-based randomness on the host: every random number is a function of (key, position), so nothing is ever saved.

A stream of batches built from it can be entered anywhere, by any number of processes and threads, and is the same one.
The numbers never change between versions of this or any library: checkpoints store a position and rely on it.

Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). The shuffle is a Feistel network over the next power of two with
cycle walking (Black and Rogaway, CT-RSA 2002), so that an order of any length costs no memory.
"""

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def _mix(z):
    """SplitMix64's output function: a bijection of uint64 that avalanches."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(key, position):
    """Element `position` (int array, 0-based) of the SplitMix64 sequence seeded with `key`; uint64, same shape."""
    position = np.atleast_1d(np.asarray(position)).astype(np.uint64)  # arrays: NumPy warns when scalars wrap
    return _mix(np.uint64(key) + (position + np.uint64(1)) * _GAMMA)


def make_key(*parts: int) -> np.uint64:
    """One key from several integers (seed, purpose, epoch, ...); their order matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = bits(key, 0) ^ _mix(np.asarray([part % 2**64], np.uint64))
    return bits(key, 0)[0]


def uniform(key, position):
    """float64 in [0, 1) with 53 random bits."""
    return (bits(key, position) >> np.uint64(11)) * 2.0**-53


def normal_pairs(key, position):
    """(n, 2) standard normals, one pair for each position (Box and Muller)."""
    position = np.asarray(position).astype(np.uint64)
    u = uniform(key, np.uint64(2) * position)
    angle = 2 * np.pi * uniform(key, np.uint64(2) * position + np.uint64(1))
    radius = np.sqrt(-2 * np.log1p(-u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def permute(key, index, n: int):
    """Image of `index` (int array in [0, n)) under a pseudo-random permutation of range(n) chosen by `key`.

    Every order of a handful of items can occur, if not all equally often; data sets are larger.
    """
    width = (n - 1).bit_length()
    low, high = np.uint64(width - width // 2), np.uint64(width // 2)  # bits of the two halves
    low_mask, high_mask = ((np.uint64(1) << b) - np.uint64(1) for b in (low, high))
    keys = bits(key, np.arange(_ROUNDS))
    out = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):  # a value outside [0, n) is fed in again until it lands inside: at most 2 passes on average
        right, left = out[todo] & low_mask, out[todo] >> low
        for r in range(0, _ROUNDS, 2):
            left ^= _mix(right + keys[r]) & high_mask
            right ^= _mix(left + keys[r + 1]) & low_mask
        out[todo] = left << low | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)
