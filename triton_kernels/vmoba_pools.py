"""VMoBA's choice of chunks for pools of many queries: one chunk, one head, or a whole sample.

A pool is cut into parts, and its bar is built four bits at a time: each part counts (and, for a threshold, adds up the
normalised gates of) its entries by their next digit, then one program a pool reads all parts in order and picks the
digit. Nothing is sorted, nothing waits for the device, and sums run in one order: the same mask on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.sla_common import blocks_of
from triskele.triton_kernels.vmoba_gates import EPS, normalised, rank_of, spread_of

SPAN = 8192  # the most entries of a part
SIZES = ["inner", "outer_stride", "inner_stride", "run_stride", "parts", "row", "length", "chunks", "shift", "places"]


@triton.jit
def _part(parts, inner, outer_stride, inner_stride, run_stride, row, length, chunks, SPAN: tl.constexpr):
    """(pool, part, where the gates of its run start, the run's chunk, the part's first token). A run is the queries of
    one chunk and head; row = H S. int64"""
    pool, part = (tl.program_id(0) // parts).to(tl.int64), (tl.program_id(0) % parts).to(tl.int64)
    run_parts = tl.cdiv(length, SPAN)
    run = (pool // inner) * outer_stride + (pool % inner) * inner_stride + (part // run_parts) * run_stride
    return pool, part, run, (run // row) % chunks, (part % run_parts) * SPAN


@triton.jit
def _entries(gates, chunk_of, run, c, at, length, TILE: tl.constexpr):
    """(tokens, their gates, which are in the pool, which of those are not own) of TILE entries."""
    tokens = at + tl.arange(0, TILE)
    inside = tokens < length
    gate = tl.load(gates + run + tokens, mask=inside, other=0.0)
    return tokens, gate, inside, inside & (tl.load(chunk_of + tokens, mask=inside, other=-1) != c)


@triton.jit(do_not_specialize=SIZES)
def extent_kernel(gates, lows, highs, parts, inner, outer_stride, inner_stride, run_stride, row, length, chunks,
                  SPAN: tl.constexpr, TILE: tl.constexpr):
    """The smallest and the largest gate of a part; NaN where one is."""
    pool, part, run, _, first = _part(parts, inner, outer_stride, inner_stride, run_stride, row, length, chunks, SPAN)
    low, high = float("inf"), float("-inf")
    broken = 0
    for at in range(first, tl.minimum(first + SPAN, length), TILE):
        tokens = at + tl.arange(0, TILE)
        inside = tokens < length
        gate = tl.load(gates + run + tokens, mask=inside, other=0.0)
        low = tl.minimum(low, tl.min(tl.where(inside, gate, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, gate, float("-inf")), 0))
        broken += tl.sum((gate != gate).to(tl.int32), 0)
    tl.store(lows + pool * parts + part, tl.where(broken > 0, float("nan"), low))
    tl.store(highs + pool * parts + part, tl.where(broken > 0, float("nan"), high))


@triton.jit(do_not_specialize=SIZES)
def totals_kernel(gates, chunk_of, lows, highs, totals, parts, inner, outer_stride, inner_stride, run_stride, row,
                  length, chunks, SPAN: tl.constexpr, TILE: tl.constexpr):
    """The sums of a part's normalised gates: of all, of own chunks."""
    pool, part, run, c, first = _part(parts, inner, outer_stride, inner_stride, run_stride, row, length, chunks, SPAN)
    low = tl.load(lows + pool).to(tl.float64)
    spread = spread_of(low, tl.load(highs + pool).to(tl.float64))
    total, mine = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    for at in range(first, tl.minimum(first + SPAN, length), TILE):
        _, gate, inside, others = _entries(gates, chunk_of, run, c, at, length, TILE)
        n = tl.where(inside, normalised(gate, low, spread), 0.0)
        total += n
        mine += tl.where(others, 0.0, n)
    out = totals + (pool * parts + part) * 2
    tl.store(out, tl.sum(total, 0))
    tl.store(out + 1, tl.sum(mine, 0))


@triton.jit(do_not_specialize=SIZES)
def digits_kernel(gates, chunk_of, bars, lows, highs, counts, sums, parts, inner, outer_stride, inner_stride,
                  run_stride, row, length, chunks, shift, THRESHOLD: tl.constexpr, SPAN: tl.constexpr,
                  TILE: tl.constexpr):
    """Of a part's entries whose higher digits are the bar's so far: how many have each next digit, and their sums."""
    pool, part, run, c, first = _part(parts, inner, outer_stride, inner_stride, run_stride, row, length, chunks, SPAN)
    bar = tl.load(bars + pool)
    low, spread = 0.0, 1.0
    if THRESHOLD:
        low = tl.load(lows + pool).to(tl.float64)
        spread = spread_of(low, tl.load(highs + pool).to(tl.float64))
    digits = tl.arange(0, 16)
    count, total = tl.zeros([TILE, 16], tl.int32), tl.zeros([TILE, 16], tl.float64)
    for at in range(first, tl.minimum(first + SPAN, length), TILE):
        _, gate, _, others = _entries(gates, chunk_of, run, c, at, length, TILE)
        rank = rank_of(gate).to(tl.int64)
        alike = others & ((rank >> (shift + 4)) == (bar >> (shift + 4)))
        hit = alike[:, None] & (((rank >> shift) & 15)[:, None] == digits[None, :])  # [TILE, 16]
        count += hit.to(tl.int32)
        if THRESHOLD:
            total += tl.where(hit, normalised(gate, low, spread)[:, None], 0.0)
    out = (pool * parts + part) * 16 + digits
    tl.store(counts + out, tl.sum(count, 0))
    if THRESHOLD:
        tl.store(sums + out, tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def cut_kernel(counts, sums, bars, above, reached, totals, rests, firsts, parts, places, shift, THRESHOLD: tl.constexpr,
               TILE: tl.constexpr):
    """The next digit of one pool's bar: the largest that enough entries reach. `above` and `reached` take what is past
    it, and after the last digit firsts[part] the number of the entries at the bar in the parts before."""
    pool = tl.program_id(0).to(tl.int64)
    digits, i = tl.arange(0, 16), tl.arange(0, TILE)
    count, total = tl.zeros([16], tl.int64), tl.zeros([16], tl.float64)
    for start in range(0, parts, TILE):
        at = (pool * parts + start + i)[:, None] * 16 + digits[None, :]
        inside = (start + i < parts)[:, None]
        count += tl.sum(tl.load(counts + at, mask=inside, other=0).to(tl.int64), 0)
        if THRESHOLD:
            total += tl.sum(tl.load(sums + at, mask=inside, other=0.0), 0)
    past = digits[None, :] > digits[:, None]  # [digit, those above it]
    already, summed = tl.load(above + pool), tl.load(reached + pool)
    more = already + tl.sum(tl.where(past, count[None, :], 0), 1)
    larger = summed + tl.sum(tl.where(past, total[None, :], 0.0), 1)
    if THRESHOLD:
        enough = (more + count > 0) & ((larger + total) / tl.load(totals + pool) >= tl.load(rests + pool))
    else:
        enough = more + count >= places
    digit = tl.max(tl.where(enough, digits, 0), 0)
    bar = tl.load(bars + pool) | (digit.to(tl.int64) << shift)
    tl.store(bars + pool, bar)
    tl.store(above + pool, tl.sum(tl.where(digits == digit, more, 0), 0))
    tl.store(reached + pool, tl.sum(tl.where(digits == digit, larger, 0.0), 0))
    if shift == 0:
        before = tl.zeros([], tl.int64)
        for start in range(0, parts, TILE):
            part = start + i
            ties = tl.load(counts + (pool * parts + part) * 16 + digit, mask=part < parts, other=0).to(tl.int64)
            tl.store(firsts + pool * parts + part, before + tl.cumsum(ties, 0) - ties, mask=part < parts)
            before += tl.sum(ties, 0)


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(gates, chunk_of, bars, above, reached, totals, rests, lows, highs, firsts, mask, parts, inner,
                 outer_stride, inner_stride, run_stride, row, length, chunks, places, THRESHOLD: tl.constexpr,
                 SPAN: tl.constexpr, TILE: tl.constexpr):
    """A part's mask: past the bar, own, or at the bar and still wanted."""
    pool, part, run, c, first = _part(parts, inner, outer_stride, inner_stride, run_stride, row, length, chunks, SPAN)
    bar, past = tl.load(bars + pool), tl.load(above + pool)
    ties_before = tl.load(firsts + pool * parts + part)
    for at in range(first, tl.minimum(first + SPAN, length), TILE):
        tokens, gate, inside, others = _entries(gates, chunk_of, run, c, at, length, TILE)
        rank = rank_of(gate).to(tl.int64)
        tie = others & (rank == bar)
        ties = tie.to(tl.int64)
        before = ties_before + tl.cumsum(ties, 0) - ties
        ties_before += tl.sum(ties, 0)
        if THRESHOLD:
            low = tl.load(lows + pool).to(tl.float64)
            n = normalised(gate, low, spread_of(low, tl.load(highs + pool).to(tl.float64)))
            short = (tl.load(reached + pool) + before.to(tl.float64) * n) / tl.load(totals + pool)
            wanted = (past + before == 0) | ~(short >= tl.load(rests + pool))
        else:
            wanted = past + before < places
        chosen = (others & (rank > bar)) | (tie & wanted) | (inside & ~others)
        tl.store(mask + run + tokens, chosen.to(tl.uint8), mask=inside)


# ------------------------------------------------------------------------------------------------ launchers

@dataclass(frozen=True)
class Pools:
    """The pools of gates [B, C, H, S]. Each is `runs` runs of S neighbours (one chunk and head), `run_stride` apart, in
    (chunk, head, token) order; pool p starts at p // inner * outer_stride + p % inner * inner_stride."""

    number: int
    runs: int
    inner: int
    outer_stride: int
    inner_stride: int
    run_stride: int


def pools_of(pool: str, batch: int, chunks: int, heads: int, length: int) -> Pools:
    row = heads * length
    if pool == "block":
        return Pools(batch * chunks, heads, 1, row, 0, length)
    if pool == "head":
        return Pools(batch * heads, chunks, heads, chunks * row, length, row)
    return Pools(batch, chunks * heads, 1, chunks * row, 0, length)


def choose_pools(gates: Tensor, chunk_of: Tensor, mask: Tensor, pool: str, others: int | None, share: float) -> None:
    """Fills mask (bool, as gates). others: chunks a query besides its own, for top-k; None: by the threshold, share."""
    batch, chunks, heads, length = gates.shape
    pools = pools_of(pool, batch, chunks, heads, length)
    n, parts = pools.number, pools.runs * blocks_of(length, SPAN)
    shape = (parts, pools.inner, pools.outer_stride, pools.inner_stride, pools.run_stride, heads * length, length,
             chunks)
    by_share = others is None
    places = 0 if by_share else others * (length if pool == "head" else heads * length)
    bars, above = (gates.new_zeros(n, dtype=torch.int64) for _ in range(2))
    reached = gates.new_zeros(n, dtype=torch.float64)
    counts = gates.new_empty((n, parts, 16), dtype=torch.int32)
    firsts = gates.new_empty((n, parts), dtype=torch.int64)
    lows = highs = sums = totals = rests = reached  # not read by top-k
    if by_share:
        lows, highs = gates.new_empty((n, parts)), gates.new_empty((n, parts))
        extent_kernel[(n * parts,)](gates, lows, highs, *shape, SPAN=SPAN, TILE=1024, num_warps=4)
        lows, highs = lows.amin(1), highs.amax(1)
        both = gates.new_empty((n, parts, 2), dtype=torch.float64)
        totals_kernel[(n * parts,)](gates, chunk_of, lows, highs, both, *shape, SPAN=SPAN, TILE=512, num_warps=4)
        both = both.sum(1)
        totals = both[:, 0] + EPS
        rests = (share - both[:, 1] / totals).clamp(min=0)
        sums = gates.new_empty((n, parts, 16), dtype=torch.float64)
    for shift in range(28, -1, -4):
        digits_kernel[(n * parts,)](gates, chunk_of, bars, lows, highs, counts, sums, *shape, shift,
                                    THRESHOLD=by_share, SPAN=SPAN, TILE=256, num_warps=8)
        cut_kernel[(n,)](counts, sums, bars, above, reached, totals, rests, firsts, parts, places, shift,
                         THRESHOLD=by_share, TILE=256, num_warps=8)
    apply_kernel[(n * parts,)](gates, chunk_of, bars, above, reached, totals, rests, lows, highs, firsts,
                               mask.view(torch.uint8), *shape, places, THRESHOLD=by_share, SPAN=SPAN,
                               TILE=512, num_warps=4)
