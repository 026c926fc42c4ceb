"""Chips: vendor figures, used for utilisation and for plans. Peaks are dense bfloat16.

Sources: Cloud TPU documentation (system architecture of v4, v5e, v5p, v6e), NVIDIA data sheets (A100 80 GB SXM, H100 SXM, H200 SXM).
"""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """flops: bf16 FLOP/s; memory: bytes that a program may use (of v5e, v5p and v6e as the compiler says); bandwidth: of that memory, byte/s; ring: byte/s that a device
    sends when a collective goes round one axis of the mesh (two of a TPU's links, all of a GPU's NVLink)."""

    flops: float
    memory: float
    bandwidth: float
    ring: float


GIB = 2.0**30
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 100e9),  # 2400 Gbit/s over 6 links
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 100e9),  # 1600 Gbit/s over 4 links
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 200e9),  # 4800 Gbit/s over 6 links
    "v6e": Chip(918e12, 31.25 * GIB, 1600e9, 200e9),  # 3200 Gbit/s over 4 links
    "A100": Chip(312e12, 80e9, 2039e9, 300e9),
    "H100": Chip(989e12, 80e9, 3350e9, 450e9),
    "H200": Chip(989e12, 141e9, 4800e9, 450e9),
}
# How jax spells them in `device_kind` where it is not the name above.
KINDS = {"v5 lite": "v5e", "v6 lite": "v6e", "v5": "v5p"}


def chip(kind: str) -> Chip | None:
    """The chip of a jax `device_kind`, or None where it is not listed (CPUs)."""
    names = {k: v for k, v in (*KINDS.items(), *((name, name) for name in CHIPS))}
    # The longest match: "TPU v5 lite" is no v5p.
    found = max((k for k in names if k.lower() in kind.lower()), key=len, default=None)
    return CHIPS[names[found]] if found else None


def here() -> Chip | None:
    """The chip that this process computes on."""
    return chip(jax.devices()[0].device_kind)
