"""Accelerators by their published figures, and the time that a step takes on them at an assumed share of those.

TPUs: the tables of docs.cloud.google.com/tpu/docs/v5e, v5p and v6e. GPUs: NVIDIA's data sheets of the H100 and H200
(SXM); nodes as DGX H100 and H200 have them, eight GPUs with a 400 Gb/s adapter each.
"""

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from miracle_jax.cost import Collective
from miracle_jax.errors import UserError


class Chip(NamedTuple):
    """Figures of one chip."""

    name: str
    flops: float
    """Peak FLOP/s of dense bfloat16 products."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s that it sends to the chips of its domain, all links together: half of what is published as
    bidirectional."""
    domain: int
    """Chips that such links connect."""
    beyond: float
    """Bytes/s that it sends out of the domain, over the network between hosts."""
    topologies: tuple[str, ...] = ()
    """Slices of a TPU, for its own compiler."""


_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16e9, 819e9, 200e9, 256, 200e9 / 8 / 8, _2D),  # 2 x 100 Gb/s for 8 chips
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2765e9, 600e9, 6144, 200e9 / 8 / 4,  # 2 x 100 Gb/s for 4 chips
                ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1638e9, 400e9, 256, 4 * 200e9 / 8 / 8, _2D),  # 4 x 200 Gb/s for 8 chips
    "h100": Chip("H100 SXM", 989e12, 80e9, 3350e9, 450e9, 8, 400e9 / 8),
    "h200": Chip("H200 SXM", 989e12, 141e9, 4800e9, 450e9, 8, 400e9 / 8),
}  # fmt: skip

COMPUTE, BANDWIDTH, NETWORK, ROOM = 0.5, 0.3, 0.7, 0.9
"""Shares of the published figures that a step is assumed to reach: of peak FLOP/s, of memory bandwidth and of network
bandwidth; and of the memory that it may fill.

That of memory bandwidth is for what products and the optimizer read and write. A whole step moves more: 2.4 times as
much in the program that TPU v5e's compiler makes of configs/base.py, at 4 rows a device."""


def find(name: str) -> Chip:
    """Raises UserError for an unknown name."""
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower(), CHIPS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(CHIPS)}"
        raise UserError(f"--chip {name} is unknown; {hint}")
    return CHIPS[name]


def seconds(chip: Chip, flops: float, memory: float, collectives: Sequence[Collective]) -> dict[str, float]:
    """What compute, memory and network each take of a step, in seconds, had it the chip to itself.

    flops, memory: FLOPs of one chip, and bytes that it reads and writes.
    """
    return {
        "compute": flops / (chip.flops * COMPUTE),
        "memory": memory / (chip.bandwidth * BANDWIDTH),
        "network": sum(_collective(chip, one) for one in collectives) / NETWORK,
    }


def _collective(chip: Chip, one: Collective) -> float:
    """By rings: first inside each domain, then with 1/k of the bytes between the domains, k chips of a group in each.

    A member of n sends (n - 1)/n of the bytes to gather or to scatter, twice that to reduce; a permutation sends all.
    """
    group = one.groups[0]
    if one.kind == "collective-permute":
        crosses = np.any(one.groups // chip.domain != one.groups[:, :1] // chip.domain)
        return one.bytes / (chip.beyond if crosses else chip.link)
    domains = np.unique(group // chip.domain).size
    inside = math.ceil(group.size / domains)
    passes = 2 if one.kind == "all-reduce" else 1
    within = one.bytes * (inside - 1) / inside / chip.link
    between = one.bytes / inside * (domains - 1) / domains / chip.beyond
    return passes * (within + between)
