"""VMoBA's choice of chunks: of each pool of gates the best, and own chunks besides.

What a pool keeps is found without sorting: gates become integers that compare like them, and the bar is built from its
high bit down, by counting what reaches it (or adding up its normalised gates, for a threshold). Equal gates rank by
chunk, head, token. Pools of one query are cut here, in one launch; larger ones in `vmoba_pools`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.sla_common import blocks_of
from triskele.triton_kernels.vmoba_common import SIZES
from triskele.triton_kernels.vmoba_gates import gates_of, normalised, rank_of, spread_of
from triskele.triton_kernels.vmoba_lists import chunk_of_tokens
from triskele.triton_kernels.vmoba_pools import choose_pools


@triton.jit
def _gate_tile(gates, own, c, chunks, stride, live):
    """(gates [TILE, BM], which of them are in the pools, which of those are not own) of the chunks c."""
    inside = (c < chunks)[:, None] & live[None, :]
    gate = tl.load(gates + c.to(tl.int64)[:, None] * stride, mask=inside, other=0.0)
    return gate, inside, inside & (c[:, None] != own[None, :])


@triton.jit(do_not_specialize=[*SIZES, "places"])
def choose_kernel(gates, chunk_of, mask, target, heads, length, chunks, places, THRESHOLD: tl.constexpr,
                  BM: tl.constexpr, TILE: tl.constexpr):
    """Pools of one query: BM of them. A query's bar is the largest rank that enough chunks reach: `places` of them, or
    target[0] of the sum. All where there are not that many."""
    tiles = tl.cdiv(length, BM)
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    tokens = at * BM + tl.arange(0, BM)
    live = tokens < length
    own = tl.load(chunk_of + tokens, mask=live, other=-1)
    base = (bh // heads * chunks * heads + bh % heads) * length
    stride = heads.to(tl.int64) * length
    gates += base + tokens[None, :]
    mask += base + tokens[None, :]

    low, spread = tl.zeros([BM], tl.float64), tl.full([BM], 1.0, tl.float64)
    total, rest = spread, low
    if THRESHOLD:
        lowest, highest = tl.full([BM], float("inf"), tl.float32), tl.full([BM], float("-inf"), tl.float32)
        broken = tl.zeros([BM], tl.int32)
        for start in range(0, chunks, TILE):
            gate, inside, _ = _gate_tile(gates, own, start + tl.arange(0, TILE), chunks, stride, live)
            lowest = tl.minimum(lowest, tl.min(tl.where(inside, gate, float("inf")), 0))
            highest = tl.maximum(highest, tl.max(tl.where(inside, gate, float("-inf")), 0))
            broken += tl.sum((gate != gate).to(tl.int32), 0)
        low = tl.where(broken > 0, float("nan"), lowest).to(tl.float64)  # then nothing reaches the target
        spread = spread_of(low, highest.to(tl.float64))
        sums, mine = tl.zeros([TILE, BM], tl.float64), tl.zeros([TILE, BM], tl.float64)
        for start in range(0, chunks, TILE):
            gate, inside, others = _gate_tile(gates, own, start + tl.arange(0, TILE), chunks, stride, live)
            n = tl.where(inside, normalised(gate, low[None, :], spread[None, :]), 0.0)
            sums += n
            mine += tl.where(others, 0.0, n)
        total = tl.sum(sums, 0) + 1e-6  # EPS
        rest = tl.load(target) - tl.sum(mine, 0) / total
        rest = tl.where(rest < 0, 0.0, rest)

    bar = tl.zeros([BM], tl.uint32)
    one = tl.full([BM], 1, tl.uint32)
    for bit in range(32):
        trial = bar | (one << (31 - bit))
        count, reached = _reach(gates, own, trial, chunks, stride, live, low, spread, THRESHOLD, BM, TILE)
        enough = (count > 0) & (reached / total >= rest) if THRESHOLD else count >= places
        bar = tl.where(enough, trial, bar)

    # Of those at the bar as many as it takes, the first chunks first; `above` is past it.
    above, reached = _reach(gates, own, bar + 1, chunks, stride, live, low, spread, THRESHOLD, BM, TILE)
    top = bar == 0xFFFFFFFF
    above, reached = tl.where(top, 0, above), tl.where(top, 0.0, reached)
    for start in range(0, chunks, TILE):
        c = start + tl.arange(0, TILE)
        gate, inside, others = _gate_tile(gates, own, c, chunks, stride, live)
        rank = tl.where(others, rank_of(gate), 0)
        ties = (others & (rank == bar[None, :])).to(tl.int32)
        before = tl.cumsum(ties, 0) - ties
        if THRESHOLD:
            n = normalised(gate, low[None, :], spread[None, :])
            short = (reached[None, :] + before.to(tl.float64) * n) / total[None, :]
            wanted = ((above[None, :] + before) == 0) | ~(short >= rest[None, :])
            reached += tl.sum(tl.where(ties != 0, n, 0.0), 0)
        else:
            wanted = above[None, :] + before < places
        above += tl.sum(ties, 0)
        chosen = (rank > bar[None, :]) | ((ties != 0) & wanted) | (inside & (c[:, None] == own[None, :]))
        tl.store(mask + c.to(tl.int64)[:, None] * stride, chosen.to(tl.uint8), mask=inside)


@triton.jit
def _reach(gates, own, bar, chunks, stride, live, low, spread, THRESHOLD: tl.constexpr, BM: tl.constexpr,
           TILE: tl.constexpr):
    """Per query: (how many other chunks rank at the bar or above, the sum of their normalised gates)."""
    count, reached = tl.zeros([TILE, BM], tl.int32), tl.zeros([TILE, BM], tl.float64)
    for start in range(0, chunks, TILE):
        gate, _, others = _gate_tile(gates, own, start + tl.arange(0, TILE), chunks, stride, live)
        hit = others & (rank_of(gate) >= bar[None, :])
        count += hit.to(tl.int32)
        if THRESHOLD:
            reached += tl.where(hit, normalised(gate, low[None, :], spread[None, :]), 0.0)
    return tl.sum(count, 0), tl.sum(reached, 0)


# ------------------------------------------------------------------------------------------------ launchers

def select(q: Tensor, k: Tensor, order: Tensor | None, bounds: Tensor, mode: str, pool: str, top_k: int,
           threshold: float) -> Tensor:
    """bool [B, C, H, S] as `triskele.ops.vmoba.reference.select`."""
    batch, heads, length, _ = q.shape
    mask = q.new_empty((batch, bounds.shape[0] - 1, heads, length), dtype=torch.bool)
    if mask.numel() == 0:
        return mask
    gates, chunk_of = gates_of(q, k, order, bounds), chunk_of_tokens(order, bounds, length)
    # beyond any sum: a threshold of 1 takes all, which a sum short of the total by EPS could miss by rounding
    share = float("inf") if threshold >= 1 else threshold
    if pool != "query":
        choose_pools(gates, chunk_of, mask, pool, top_k - 1 if mode == "topk" else None, share)
        return mask
    target = torch.full((1,), share, dtype=torch.float64, device=q.device)  # a kernel's float argument is a float32
    rows = 64
    choose_kernel[(batch * heads * blocks_of(length, rows),)](
        gates, chunk_of, mask.view(torch.uint8), target, heads, length, mask.shape[1], top_k - 1,
        THRESHOLD=mode == "threshold", BM=rows, TILE=16, num_warps=4)
    return mask
