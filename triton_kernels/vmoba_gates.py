"""VMoBA's gates g[c, h, s] = q_s . mean(K_c), and how they compare.

Means and gates are float64, rounded once to float32, so that near-ties fall as in the reference and on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.sla_common import blocks_of, load_columns, load_rows, padded, row_major
from triskele.triton_kernels.vmoba_common import SIZES, strides_of, tokens_at

EPS = 1e-6
"""Added to the sum of the normalised gates; also the spread at and below which they are not divided by it."""


@triton.jit(do_not_specialize=SIZES)
def chunk_means_kernel(k, order, bounds, means, k_b, k_h, k_l, heads, chunks, ORDERED: tl.constexpr,
                       UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """The mean key of one chunk -> float64 [DP]."""
    c, bh = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    k += (bh // heads * k_b + bh % heads * k_h) * UNIT
    first, stop = tl.load(bounds + c), tl.load(bounds + c + 1)
    total = tl.zeros([DP], tl.float64)
    for start in range(first, stop, ROWS):
        positions = start + tl.arange(0, ROWS)
        seen = positions < stop
        tokens = tokens_at(order, positions, seen, ORDERED)
        total += tl.sum(load_rows(k, tokens, k_l * UNIT, seen, D, DP).to(tl.float64), 0)
    tl.store(means + (bh * chunks + c) * DP + tl.arange(0, DP), total / (stop - first).to(tl.float64))


@triton.jit(do_not_specialize=SIZES)
def gates_kernel(q, means, gates, q_b, q_h, q_l, heads, length, chunks, UNIT: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """A tile of chunks and queries -> float32 [B, C, H, S]."""
    tiles_c = tl.cdiv(chunks, BC)
    tiles = tl.cdiv(length, BM) * tiles_c
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    c = (at % tiles_c) * BC + tl.arange(0, BC)
    rows = (at // tiles_c) * BM + tl.arange(0, BM)
    inside, live = c < chunks, rows < length
    q += (b * q_b + h * q_h) * UNIT
    acc = tl.zeros([BC, BM], tl.float64)
    x = load_columns(q, rows, q_l * UNIT, live, 0, D, BD).to(tl.float64)
    for d in range(0, DP, BD):
        depth = d + tl.arange(0, BD)
        m = tl.load(means + (bh * chunks + c[:, None]) * DP + depth[None, :], mask=inside[:, None], other=0.0)
        # x is float64 already where the loop begins: beside a load of halves Triton 3.6 lays out the operands of a
        # float64 product as it cannot translate them
        acc = tl.dot(m, tl.trans(x), acc, out_dtype=tl.float64)  # [BC, BD] @ [BD, BM] -> [BC, BM]
        x = load_columns(q, rows, q_l * UNIT, live, d + BD, D, BD).to(tl.float64)
    place = ((b * chunks + c[:, None]) * heads + h) * length + rows[None, :]
    tl.store(gates + place, acc.to(tl.float32), mask=inside[:, None] & live[None, :])


@triton.jit
def rank_of(gate):
    """uint32 that compares like the gate: NaN above all, -0 as 0; never 0, which stands for what is not in the pool."""
    gate = tl.where(gate == 0, 0.0, gate)
    bits = tl.where(gate == gate, gate.to(tl.int32, bitcast=True), 0x7FC00000)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def normalised(gate, low, spread):
    return (gate.to(tl.float64) - low) / spread


@triton.jit
def spread_of(low, high):
    """What normalised gates are divided by."""
    spread = high - low
    return tl.where(spread > 1e-6, spread, 1.0)  # EPS; NaN is not larger either


# ------------------------------------------------------------------------------------------------ launchers

def gates_of(q: Tensor, k: Tensor, order: Tensor | None, bounds: Tensor) -> Tensor:
    """g float32 [B, C, H, S]."""
    batch, heads, length, dim = q.shape
    chunks, wide = bounds.shape[0] - 1, padded(dim)
    q, k = row_major(q), row_major(k)
    means = q.new_empty((batch * heads, chunks, wide), dtype=torch.float64)
    gates = q.new_empty((batch, chunks, heads, length), dtype=torch.float32)
    unit, strides = strides_of(k)
    chunk_means_kernel[(batch * heads * chunks,)](
        k, bounds if order is None else order, bounds, means, *strides, heads, chunks, ORDERED=order is not None,
        UNIT=unit, D=dim, DP=wide, ROWS=64, num_warps=4)
    unit, strides = strides_of(q)
    tile_c, tile_m = 32, 64
    gates_kernel[(batch * heads * blocks_of(length, tile_m) * blocks_of(chunks, tile_c),)](
        q, means, gates, *strides, heads, length, chunks, UNIT=unit, D=dim, DP=wide, BC=tile_c, BM=tile_m,
        BD=16, num_warps=8, num_stages=2)
    return gates
