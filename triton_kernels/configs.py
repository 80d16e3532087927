"""Tile choices of the Triton kernels, as frozen data: by chip, head_dim and dtype; each family a table of its own.

Chosen by what the compiler made of them (registers, spills, shared memory; see docs/triton.md), not by timing: none of
these has run on hardware yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """A launch: rows and columns of a tile (queries and keys; tokens and features), the depth of a product's step where
    the kernel has one, warps, and stages of the software pipeline."""

    rows: int
    cols: int
    warps: int
    stages: int
    depth: int = 0

    @property
    def options(self) -> dict:
        return {"num_warps": self.warps, "num_stages": self.stages}


CHIPS = (80, 89, 90, 100, 120)
"""Compute capabilities that the tables know."""


def capability(device: torch.device) -> int:
    """90 for an H100. A tensor on the CPU is the interpreter's, which takes the first chip's tiles."""
    if device.type != "cuda":
        return CHIPS[0]
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def chip_of(device: torch.device) -> int:
    """Whose tiles a device takes: its own, or those of the chip below it that has no more shared memory."""
    found = capability(device)
    if found == 86:  # 99 KiB a block, as sm_89; sm_80 has 163
        return 89
    return max((chip for chip in CHIPS if chip <= found), default=CHIPS[0])


def lookup(table: dict, device: torch.device, *key):
    """table[chip, *key] for the device's chip, or table[key] where every chip takes the same."""
    chosen = table.get((chip_of(device), *key))
    return table[key] if chosen is None else chosen


# ------------------------------------------------------------------------------------------------ SLA
# (chip, padded head_dim, bits of the dtype), or (padded head_dim, bits) for every chip.

SLA_FORWARD = {  # rows: queries, cols: keys
    (80, 32, 16): Tile(128, 64, 4, 3), (80, 64, 16): Tile(128, 64, 8, 3), (80, 128, 16): Tile(64, 64, 8, 3),
    (89, 32, 16): Tile(128, 64, 4, 3), (89, 64, 16): Tile(128, 64, 8, 3), (89, 128, 16): Tile(64, 32, 8, 2),
    (90, 32, 16): Tile(128, 64, 4, 3), (90, 64, 16): Tile(128, 64, 4, 3), (90, 128, 16): Tile(128, 64, 8, 3),
    (100, 32, 16): Tile(128, 64, 4, 3), (100, 64, 16): Tile(128, 64, 8, 3), (100, 128, 16): Tile(128, 64, 8, 3),
    (120, 32, 16): Tile(128, 64, 4, 3), (120, 64, 16): Tile(128, 64, 8, 3), (120, 128, 16): Tile(64, 32, 8, 2),
    (32, 32): Tile(64, 32, 4, 1), (64, 32): Tile(32, 32, 8, 1), (128, 32): Tile(32, 32, 8, 1),
}
SLA_QUERIES = {  # the backward's dQ; rows: queries, cols: keys
    (80, 32, 16): Tile(64, 64, 4, 3), (80, 64, 16): Tile(64, 64, 8, 2), (80, 128, 16): Tile(64, 64, 8, 2),
    (89, 32, 16): Tile(64, 64, 4, 3), (89, 64, 16): Tile(64, 64, 8, 2), (89, 128, 16): Tile(64, 32, 8, 2),
    (90, 32, 16): Tile(64, 64, 4, 3), (90, 64, 16): Tile(64, 64, 4, 3), (90, 128, 16): Tile(64, 64, 8, 2),
    (100, 32, 16): Tile(64, 64, 4, 3), (100, 64, 16): Tile(64, 64, 4, 3), (100, 128, 16): Tile(64, 64, 8, 2),
    (120, 32, 16): Tile(64, 64, 4, 3), (120, 64, 16): Tile(64, 64, 8, 2), (120, 128, 16): Tile(64, 32, 8, 2),
    (32, 32): Tile(64, 32, 4, 1), (64, 32): Tile(32, 32, 8, 1), (128, 32): Tile(32, 32, 8, 1),
}
SLA_KEYS = {  # the backward's dK and dV; rows: queries, cols: keys
    (80, 32, 16): Tile(64, 64, 4, 3), (80, 64, 16): Tile(32, 64, 4, 2), (80, 128, 16): Tile(64, 32, 8, 2),
    (89, 32, 16): Tile(64, 64, 4, 3), (89, 64, 16): Tile(64, 32, 4, 2), (89, 128, 16): Tile(64, 32, 8, 2),
    (90, 32, 16): Tile(64, 64, 4, 3), (90, 64, 16): Tile(64, 64, 4, 3), (90, 128, 16): Tile(64, 64, 8, 2),
    (100, 32, 16): Tile(64, 64, 4, 3), (100, 64, 16): Tile(64, 64, 4, 3), (100, 128, 16): Tile(64, 64, 8, 2),
    (120, 32, 16): Tile(64, 64, 4, 3), (120, 64, 16): Tile(64, 32, 4, 2), (120, 128, 16): Tile(64, 32, 8, 2),
    (32, 32): Tile(16, 32, 4, 1), (64, 32): Tile(32, 32, 8, 1), (128, 32): Tile(16, 32, 8, 1),
}
SLA_STATES = {  # rows: tokens a step of the outer products, cols: columns of a state
    (32, 16): Tile(64, 32, 4, 2), (64, 16): Tile(32, 64, 4, 2), (128, 16): Tile(32, 128, 8, 2),
    (120, 128, 16): Tile(32, 64, 8, 2),
    (32, 32): Tile(32, 32, 4, 2), (64, 32): Tile(32, 32, 8, 2), (128, 32): Tile(16, 64, 8, 2),
}
SLA_SUM_ALL = {  # rows: of the state
    (32, 16): Tile(16, 0, 4, 2), (64, 16): Tile(16, 0, 4, 2), (128, 16): Tile(16, 0, 8, 2),
    (32, 32): Tile(16, 0, 4, 2), (64, 32): Tile(16, 0, 4, 2), (128, 32): Tile(16, 0, 8, 2),
}
SLA_SUM_SCOPE = {  # rows: blocks whose states are summed, depth: blocks of a step of the sum
    (32, 16): Tile(64, 0, 4, 2, 32), (64, 16): Tile(64, 0, 8, 2, 32), (128, 16): Tile(64, 0, 8, 2, 32),
    (32, 32): Tile(64, 0, 4, 1, 32), (64, 32): Tile(32, 0, 8, 1, 32), (128, 32): Tile(32, 0, 8, 1, 32),
}


# ------------------------------------------------------------------------------------------------ VMoBA
# Keys as SLA's ("<128": padded to it); rows: queries, cols: keys.

VMOBA_FORWARD = {
    (80, 32, 16): Tile(128, 64, 4, 3), (80, 64, 16): Tile(128, 64, 8, 3), (80, 128, 16): Tile(64, 64, 8, 3),
    (89, 32, 16): Tile(128, 64, 4, 3), (89, 64, 16): Tile(128, 64, 8, 3), (89, 128, 16): Tile(64, 64, 8, 2),
    (90, 32, 16): Tile(128, 64, 4, 3), (90, 64, 16): Tile(128, 64, 8, 3), (90, 128, 16): Tile(128, 32, 8, 3),
    (100, 32, 16): Tile(128, 64, 4, 3), (100, 64, 16): Tile(128, 64, 8, 3), (100, 128, 16): Tile(64, 64, 8, 2),
    (120, 32, 16): Tile(128, 64, 4, 3), (120, 64, 16): Tile(128, 64, 8, 3), (120, 128, 16): Tile(64, 64, 8, 2),
    (32, 32): Tile(16, 32, 4, 1), (64, 32): Tile(32, 32, 4, 1), (128, 32): Tile(16, 64, 8, 1),
}
VMOBA_BACKWARD_Q = {  # dQ
    (80, 32, 16): Tile(64, 64, 4, 3), (80, 64, 16): Tile(64, 32, 8, 2), (80, 128, 16): Tile(64, 64, 8, 2),
    (89, 32, 16): Tile(64, 64, 4, 3), (89, 64, 16): Tile(64, 32, 8, 2), (89, 128, 16): Tile(64, 32, 8, 2),
    (90, 32, 16): Tile(64, 64, 4, 3), (90, 64, 16): Tile(64, 64, 4, 3), (90, 128, 16): Tile(64, 64, 8, 2),
    (100, 32, 16): Tile(64, 64, 4, 3), (100, 64, 16): Tile(64, 64, 4, 3), (100, 128, 16): Tile(64, 64, 8, 2),
    (100, "<128", 16): Tile(64, 64, 8, 1),
    (120, 32, 16): Tile(64, 64, 4, 3), (120, 64, 16): Tile(64, 32, 8, 2), (120, 128, 16): Tile(64, 32, 8, 2),
    (32, 32): Tile(16, 32, 4, 1), (64, 32): Tile(16, 32, 4, 1), (128, 32): Tile(16, 32, 4, 1),
}
VMOBA_BACKWARD_K = {  # dK and dV
    (80, 32, 16): Tile(64, 64, 4, 3), (80, 64, 16): Tile(32, 64, 4, 2), (80, 128, 16): Tile(32, 64, 8, 2),
    (89, 32, 16): Tile(64, 64, 4, 3), (89, 64, 16): Tile(64, 64, 8, 2), (89, 128, 16): Tile(32, 64, 8, 2),
    (90, 32, 16): Tile(64, 64, 4, 3), (90, 64, 16): Tile(64, 64, 4, 3), (90, 128, 16): Tile(64, 64, 8, 2),
    (100, 32, 16): Tile(64, 64, 4, 3), (100, 64, 16): Tile(64, 64, 8, 2), (100, 128, 16): Tile(64, 64, 8, 2),
    (120, 32, 16): Tile(64, 64, 4, 3), (120, 64, 16): Tile(64, 32, 4, 2), (120, 128, 16): Tile(32, 64, 8, 2),
    (80, "<128", 32): Tile(32, 16, 8, 1), (89, "<128", 32): Tile(32, 16, 8, 1), (120, "<128", 32): Tile(32, 16, 8, 1),
    (32, 32): Tile(32, 16, 4, 1), (64, 32): Tile(32, 32, 4, 1), (128, 32): Tile(64, 16, 8, 1),
}


# ---- svdq -----------------------------------------------------------------------------------------------------------

SVDQ_PREPARE = {64: Tile(16, 0, 4, 3, depth=128), 256: Tile(16, 0, 4, 3, depth=64), 1024: Tile(16, 0, 4, 2, depth=32)}
"""By rank, times 2 where it is multiplied in float32 and times 4 where x is float32 too: up to the key."""

SVDQ_FEW = (16, 64)  # tokens up to which a product takes the tiles of its few, of its some
SVDQ_GEMM = {
    # integer codes
    (80, "few", 1): Tile(16, 64, 4, 5), (80, "some", 1): Tile(64, 64, 4, 4), (80, "many", 1): Tile(128, 64, 8, 3),
    (89, "few", 1): Tile(16, 64, 4, 5), (89, "some", 1): Tile(64, 64, 4, 4), (89, "many", 1): Tile(128, 64, 8, 3),
    (90, "few", 1): Tile(16, 64, 4, 8), (90, "some", 1): Tile(64, 64, 4, 5), (90, "many", 1): Tile(128, 128, 8, 4),
    (100, "few", 1): Tile(16, 64, 4, 8), (100, "some", 1): Tile(64, 64, 4, 5), (100, "many", 1): Tile(128, 128, 8, 4),
    (120, "few", 1): Tile(16, 64, 4, 5), (120, "some", 1): Tile(64, 64, 4, 4), (120, "many", 1): Tile(128, 64, 8, 3),
    # 16-bit activations
    (80, "few", 2): Tile(16, 64, 4, 5), (80, "some", 2): Tile(64, 64, 4, 4), (80, "many", 2): Tile(128, 64, 8, 3),
    (89, "few", 2): Tile(16, 64, 4, 5), (89, "some", 2): Tile(64, 64, 4, 4), (89, "many", 2): Tile(128, 64, 8, 3),
    (90, "few", 2): Tile(16, 64, 4, 8), (90, "some", 2): Tile(64, 64, 4, 5), (90, "many", 2): Tile(128, 128, 8, 4),
    (100, "few", 2): Tile(16, 64, 4, 8), (100, "some", 2): Tile(64, 64, 4, 5), (100, "many", 2): Tile(128, 128, 8, 4),
    (120, "few", 2): Tile(16, 64, 4, 5), (120, "some", 2): Tile(64, 64, 4, 4), (120, "many", 2): Tile(128, 64, 8, 3),
    # float32
    ("few", 4): Tile(16, 64, 4, 3), ("some", 4): Tile(16, 64, 4, 3), ("many", 4): Tile(64, 64, 4, 2),
    (90, "many", 4): Tile(64, 64, 4, 3), (100, "many", 4): Tile(64, 64, 4, 3),
    (120, "many", 4): Tile(64, 64, 8, 2),
}
"""By chip, number of tokens, bytes of an activation: rows are tokens, cols features."""


def svdq_gemm_tile(device: torch.device, tokens: int, dtype: torch.dtype) -> Tile:
    """The tile of a product of so many tokens of `dtype` with 4-bit weights."""
    size = "few" if tokens <= SVDQ_FEW[0] else "some" if tokens <= SVDQ_FEW[1] else "many"
    return lookup(SVDQ_GEMM, device, size, dtype.itemsize)


# ---- taa ------------------------------------------------------------------------------------------------------------

TAA_RESIDUAL = {4: Tile(8, 64, 1, 1), 8: Tile(4, 32, 1, 1)}
"""By bytes of a state: rows and elements that a warp has in flight. One warp a program: its sums need no barrier."""

TAA_RESIDUAL_REGISTERS = 255
"""A bound that is no bound. Without one the compiler spills, to fit more of these small programs on a multiprocessor
than there are."""

TAA_UPDATE = {4: Tile(4, 256, 4, 1), 8: Tile(2, 256, 4, 1)}


# ---- adaln ----------------------------------------------------------------------------------------------------------

ADALN_TOKENS = 4  # of a program that modulates: it makes the row's factors once
ADALN_HELD = 8192  # channels up to which the row's factors stay in registers
ADALN_GATE, ADALN_GATE_TOKENS = 2048, 32  # of a program that gates: elements, and tokens at most


def adaln_modulate_tile(channels: int) -> Tile:
    """A token in registers, 16 channels a thread and more: `channels` is a power of two."""
    return Tile(ADALN_TOKENS, channels, min(16, max(1, channels // 512)), 1)


def adaln_gate_tile(channels: int) -> Tile:
    cols = min(1024, max(16, channels))
    return Tile(min(ADALN_GATE // cols, ADALN_GATE_TOKENS), cols, 4, 1)
