"""Block routing: which key blocks a block of queries attends to, and the lists that the attention kernels walk.

    map[i, j] = rank in row i of mean(Q_i) . mean(K_j):  1 for the n_keep best, -1 for the n_drop worst, else 0

Three launches and no host synchronisation: every block's mean in one read of Q and K; scores as integers that compare
like the floats they stand for; and a row's two thresholds, found bit by bit by counting, so nothing is sorted. Blocks
that tie with a threshold are taken in the order of their index.

The int8 map is the contract between routing and attention. `row_lists` and `column_lists` turn it into what a kernel
walks: for a row of blocks its critical columns, for a column its rows, both ascending.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.sla_common import as_bytes, blocks_of, load_rows, padded, row_major, strides_of

SIZES = ["heads", "lq", "lk", "nq", "nk", "block_q", "block_k", "n_keep", "n_stay", "mask_b", "keep_b"]
TILE = 512  # blocks of a row of the map at a time


@triton.jit
def _mean(x, row_stride, start, stop, key_mask, keep_keys, HAS_MASK: tl.constexpr, HAS_KEEP: tl.constexpr,
          D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """(mean over the visible rows start ... stop - 1 [DP], visible rows, rows that keep_keys names)."""
    total = tl.zeros([DP], tl.float32)
    count, kept = 0, 0
    for at in range(start, stop, ROWS):
        rows = at + tl.arange(0, ROWS)
        seen = rows < stop
        if HAS_KEEP:
            kept += tl.sum((tl.load(keep_keys + rows, mask=seen, other=0) != 0).to(tl.int32), 0)
        if HAS_MASK:
            seen = seen & (tl.load(key_mask + rows, mask=seen, other=0) != 0)
        total += tl.sum(load_rows(x, rows, row_stride, seen, D, DP).to(tl.float32), 0)
        count += tl.sum(seen.to(tl.int32), 0)
    return total / tl.maximum(count, 1).to(tl.float32), count, kept


@triton.jit(do_not_specialize=SIZES)
def means_kernel(q, k, key_mask, keep_keys, q_means, k_means, state, q_b, q_h, q_l, k_b, k_h, k_l, mask_b, keep_b,
                 heads, lq, lk, nq, nk, block_q, block_k, UNIT: tl.constexpr, HAS_MASK: tl.constexpr,
                 HAS_KEEP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """One block of queries or keys. state [B, Nk]: 1 for a block with a visible key, + 2 with one of keep_keys."""
    at, bh = tl.program_id(0) % (nq + nk), (tl.program_id(0) // (nq + nk)).to(tl.int64)
    b, h = bh // heads, bh % heads
    cols = tl.arange(0, DP)
    if at < nq:
        start = at * block_q
        stop = tl.minimum(start + block_q, lq)
        mean, _, _ = _mean(q + (b * q_b + h * q_h) * UNIT, q_l * UNIT, start, stop, key_mask, keep_keys, False, False,
                           D, DP, ROWS)
        tl.store(q_means + (bh * nq + at) * DP + cols, mean)
    else:
        j = at - nq
        start = j * block_k
        stop = tl.minimum(start + block_k, lk)
        mean, count, kept = _mean(k + (b * k_b + h * k_h) * UNIT, k_l * UNIT, start, stop, key_mask + b * mask_b,
                                  keep_keys + b * keep_b, HAS_MASK, HAS_KEEP, D, DP, ROWS)
        tl.store(k_means + (bh * nk + j) * DP + cols, mean)
        if HAS_MASK or HAS_KEEP:
            flags = (count > 0).to(tl.int8) + 2 * (kept > 0).to(tl.int8)
            tl.store(state + b * nk + j, flags.to(tl.int8), mask=h == 0)


@triton.jit(do_not_specialize=SIZES)
def scores_kernel(q_means, k_means, state, scores, heads, nq, nk, HAS_STATE: tl.constexpr, DP: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """A tile of scores, as unsigned integers in the order of the floats; 0, below all of them, for unseen blocks."""
    tiles_n = tl.cdiv(nk, BN)
    tiles = tl.cdiv(nq, BM) * tiles_n
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    rows, cols = (at // tiles_n) * BM + tl.arange(0, BM), (at % tiles_n) * BN + tl.arange(0, BN)
    s = tl.zeros([BM, BN], tl.float32)
    for d in range(0, DP, BD):
        depth = d + tl.arange(0, BD)
        a = tl.load(q_means + (bh * nq + rows[:, None]) * DP + depth[None, :], mask=(rows < nq)[:, None], other=0.0)
        c = tl.load(k_means + (bh * nk + cols[:, None]) * DP + depth[None, :], mask=(cols < nk)[:, None], other=0.0)
        s += tl.dot(a, tl.trans(c), input_precision="tf32x3")  # [BM, BD] @ [BD, BN] -> [BM, BN]
    s = tl.where(s == s, s, -3.4028234663852886e38)
    s = tl.where(s == 0, 0.0, s)  # -0 ties with 0
    bits = s.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    if HAS_STATE:
        flags = tl.load(state + (bh // heads) * nk + cols, mask=cols < nk, other=0)
        key = tl.where((flags & 1)[None, :] != 0, key, 0)
    inside = (rows < nq)[:, None] & (cols < nk)[None, :]
    tl.store(scores + (bh * nq + rows[:, None]) * nk + cols[None, :], key, mask=inside)


@triton.jit
def _load_keys(row, cols, nk):
    return tl.load(row + cols, mask=cols < nk, other=0).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=SIZES)
def select_kernel(scores, state, block_map, heads, nq, nk, n_keep, n_stay, HAS_STATE: tl.constexpr,
                  HAS_DROP: tl.constexpr, TILE: tl.constexpr):
    """One row of the map. Its threshold is the largest t that at least n_keep scores reach, built from its high bit
    down; that of the n_stay = Nk - n_drop that are not dropped likewise."""
    row = tl.program_id(0).to(tl.int64)
    keys = scores + row * nk
    one = tl.full([], 1, tl.uint32)
    keep_bar, stay_bar = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32)
    for bit in range(32):
        keep_try, stay_try = keep_bar | (one << (31 - bit)), stay_bar | (one << (31 - bit))
        keep_count, stay_count = 0, 0
        for at in range(0, nk, TILE):
            key = _load_keys(keys, at + tl.arange(0, TILE), nk)  # padding is 0: no trial reaches down to it
            keep_count += tl.sum((key >= keep_try).to(tl.int32), 0)
            if HAS_DROP:
                stay_count += tl.sum((key >= stay_try).to(tl.int32), 0)
        keep_bar = tl.where(keep_count >= n_keep, keep_try, keep_bar)
        stay_bar = tl.where(stay_count >= n_stay, stay_try, stay_bar)

    keep_ties, stay_ties = n_keep, n_stay  # of the blocks at the threshold, how many are taken
    for at in range(0, nk, TILE):
        key = _load_keys(keys, at + tl.arange(0, TILE), nk)
        keep_ties -= tl.sum((key > keep_bar).to(tl.int32), 0)
        if HAS_DROP:
            stay_ties -= tl.sum((key > stay_bar).to(tl.int32), 0)

    for at in range(0, nk, TILE):
        cols = at + tl.arange(0, TILE)
        valid = cols < nk
        key = _load_keys(keys, cols, nk)
        ties = (valid & (key == keep_bar)).to(tl.int32)
        critical = (key > keep_bar) | ((ties != 0) & (tl.cumsum(ties, 0) <= keep_ties))
        keep_ties -= tl.sum(ties, 0)
        if HAS_STATE:
            flags = tl.load(state + (row // nq // heads) * nk + cols, mask=valid, other=0)
            critical = (critical | ((flags & 2) != 0)) & ((flags & 1) != 0)
        kind = critical.to(tl.int8)
        if HAS_DROP:
            ties = (valid & (key == stay_bar)).to(tl.int32)
            stays = (key > stay_bar) | ((ties != 0) & (tl.cumsum(ties, 0) <= stay_ties))
            stay_ties -= tl.sum(ties, 0)
            kind = tl.where(critical | stays, kind, -1).to(tl.int8)
        tl.store(block_map + row * nk + cols, kind, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(block_map, lists, counts, nk, TILE: tl.constexpr):
    """The critical columns of one row of the map, ascending."""
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for at in range(0, nk, TILE):
        cols = at + tl.arange(0, TILE)
        hit = tl.load(block_map + row * nk + cols, mask=cols < nk, other=0) == 1
        ones = hit.to(tl.int32)
        tl.store(lists + row * nk + count + tl.cumsum(ones, 0) - 1, cols, mask=hit)
        count += tl.sum(ones, 0)
    tl.store(counts + row, count)


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(block_map, lists, counts, nq, nk, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The rows where each of COLS columns is critical, ascending: the map is read along its rows."""
    tiles = tl.cdiv(nk, COLS)
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    cols = at * COLS + tl.arange(0, COLS)
    count = tl.zeros([COLS], tl.int32)
    for start in range(0, nq, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < nq)[:, None] & (cols < nk)[None, :]
        hit = tl.load(block_map + (bh * nq + rows[:, None]) * nk + cols[None, :], mask=inside, other=0) == 1
        ones = hit.to(tl.int32)
        place = count[None, :] + tl.cumsum(ones, 0) - 1
        tl.store(lists + (bh * nk + cols)[None, :] * nq + place, rows[:, None] + tl.zeros_like(ones), mask=hit)
        count += tl.sum(ones, 0)
    tl.store(counts + bh * nk + cols, count, mask=cols < nk)


# ------------------------------------------------------------------------------------------------ launchers

def route(q: Tensor, k: Tensor, n_keep: int, n_drop: int, block_q: int, block_k: int, keep_keys: Tensor | None = None,
          key_mask: Tensor | None = None) -> Tensor:
    """int8 [B, H, Nq, Nk]: 1 critical, 0 marginal, -1 negligible."""
    batch, heads, lq, dim = q.shape
    lk = k.shape[2]
    nq, nk = blocks_of(lq, block_q), blocks_of(lk, block_k)
    block_map = q.new_empty((batch, heads, nq, nk), dtype=torch.int8)
    if block_map.numel() == 0:
        return block_map
    q, k, wide = row_major(q), row_major(k), padded(dim)
    key_mask, keep_keys = as_bytes(key_mask), as_bytes(keep_keys)
    has_mask, has_keep = key_mask is not None, keep_keys is not None
    q_means = q.new_empty((batch * heads, nq, wide), dtype=torch.float32)
    k_means = q.new_empty((batch * heads, nk, wide), dtype=torch.float32)
    scores = q.new_empty((batch * heads, nq, nk), dtype=torch.int32)
    state = q.new_empty((batch, nk), dtype=torch.int8) if has_mask or has_keep else block_map
    unit, strides = strides_of(q, k)
    means_kernel[(batch * heads * (nq + nk),)](
        q, k, key_mask if has_mask else block_map, keep_keys if has_keep else block_map, q_means, k_means, state,
        *strides, lk, lk if has_keep and keep_keys.shape[0] > 1 else 0, heads, lq, lk, nq, nk,
        block_q, block_k, UNIT=unit, HAS_MASK=has_mask, HAS_KEEP=has_keep, D=dim, DP=wide, ROWS=32, num_warps=4)
    tile = 64
    grid = (batch * heads * blocks_of(nq, tile) * blocks_of(nk, tile),)
    scores_kernel[grid](q_means, k_means, state, scores, heads, nq, nk, HAS_STATE=has_mask or has_keep, DP=wide,
                        BM=tile, BN=tile, BD=min(32, wide), num_warps=4, num_stages=2)
    select_kernel[(batch * heads * nq,)](scores, state, block_map, heads, nq, nk, n_keep, nk - n_drop,
                                         HAS_STATE=has_mask or has_keep, HAS_DROP=n_drop > 0, TILE=TILE, num_warps=4)
    return block_map


def row_lists(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """(critical columns of every row, int32 [B, H, Nq, Nk], the first `count` of them set; counts [B, H, Nq])."""
    block_map = block_map.contiguous()
    nk = block_map.shape[3]
    lists = torch.empty_like(block_map, dtype=torch.int32)
    counts = block_map.new_empty(block_map.shape[:3], dtype=torch.int32)
    rows_kernel[(counts.numel(),)](block_map, lists, counts, nk, TILE=TILE, num_warps=4)
    return lists, counts


def column_lists(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """(rows where each column is critical, int32 [B, H, Nk, Nq], the first `count` of them set; counts [B, H, Nk])."""
    block_map = block_map.contiguous()
    batch, heads, nq, nk = block_map.shape
    lists = block_map.new_empty((batch, heads, nk, nq), dtype=torch.int32)
    counts = block_map.new_empty((batch, heads, nk), dtype=torch.int32)
    columns_kernel[(batch * heads * blocks_of(nk, 32),)](block_map, lists, counts, nq, nk, ROWS=64, COLS=32,
                                                         num_warps=4)
    return lists, counts
