"""VMoBA backward: (dq, dk, dv); the selection is a constant.

    P = exp(S - lse)      dS = P (dO V^T - rowsum(dO O))
    dV = P^T dO           dQ = dS K / sqrt(D)              dK = dS^T Q / sqrt(D)

One pass owns ranges of queries and walks the chunks, as the forward does. The other owns tiles of keys and walks the
list of the queries that see their chunk. Both load rows by index and compute only what was selected. No atomics: the
same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.configs import VMOBA_BACKWARD_K, VMOBA_BACKWARD_Q
from triskele.triton_kernels.sla_common import blocks_of, load_rows, padded, precision, row_major, store_rows
from triskele.triton_kernels.vmoba_common import (
    SIZES,
    strides_of,
    tile_of,
    tokens_at,
    weights_of,
)
from triskele.triton_kernels.vmoba_lists import chunk_queries, key_tiles


@triton.jit(do_not_specialize=[*SIZES, "o_b", "o_h", "o_l"])
def vmoba_dots_kernel(o, grad, out, o_b, o_h, o_l, g_b, g_h, g_l, heads, length, tiles, UNIT: tl.constexpr,
                      D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """out = rowsum(dO O)."""
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = at * ROWS + tl.arange(0, ROWS)
    live = rows < length
    b_o = load_rows(o + (b * o_b + h * o_h) * UNIT, rows, o_l * UNIT, live, D, DP)
    b_do = load_rows(grad + (b * g_b + h * g_h) * UNIT, rows, g_l * UNIT, live, D, DP)
    tl.store(out + bh * length + rows, tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1), mask=live)


@triton.jit(do_not_specialize=SIZES)
def vmoba_queries_kernel(q, k, v, order, bounds, lists, starts, lse, deltas, grad, sums, dq, q_b, q_h, q_l, k_b, k_h,
                         k_l, v_b, v_h, v_l, g_b, g_h, g_l, heads, length, chunks, ranges, size, scale,
                         ORDERED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, HELD: tl.constexpr,
                         D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dQ of a range of queries, as the forward walks it. HELD: a tile's Q and dO stay in registers; else they are read
    again for each tile of keys."""
    r, bh = tl.program_id(0) % ranges, (tl.program_id(0) // ranges).to(tl.int64)
    b, h = bh // heads, bh % heads
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    grad += (b * g_b + h * g_h) * UNIT
    sums += bh * length * D
    lse += bh * length
    deltas += bh * length
    last = tl.minimum((r + 1) * size, length)

    for start in range(r * size, last, BM):
        tokens = start + tl.arange(0, BM)
        store_rows(sums, tokens, tl.zeros([BM, DP], tl.float32), tokens < last, D, DP)

    for c in range(0, chunks):
        tl.debug_barrier()  # a row's sums were written by other threads
        first, stop = tl.load(bounds + c), tl.load(bounds + c + 1)
        row = bh * chunks + c
        listed = tl.load(starts + row * (ranges + 1) + r)
        until = tl.load(starts + row * (ranges + 1) + r + 1)
        for start in range(listed, until, BM):
            i = start + tl.arange(0, BM)
            live = i < until
            tokens = tl.load(lists + row * length + i, mask=live, other=0)
            if HELD:
                b_q = load_rows(q, tokens, q_l * UNIT, live, D, DP)
                b_do = load_rows(grad, tokens, g_l * UNIT, live, D, DP)
            shift = tl.load(lse + tokens, mask=live, other=float("inf"))  # no query there: P = 0
            delta = tl.load(deltas + tokens, mask=live, other=0.0)
            acc = load_rows(sums, tokens, D, live, D, DP)
            for key in range(first, stop, BN):
                positions = key + tl.arange(0, BN)
                seen = positions < stop
                keys = tokens_at(order, positions, seen, ORDERED)
                b_k = load_rows(k, keys, k_l * UNIT, seen, D, DP)
                b_v = load_rows(v, keys, v_l * UNIT, seen, D, DP)
                if HELD:
                    x, g = b_q, b_do
                else:
                    x = load_rows(q, tokens, q_l * UNIT, live, D, DP)
                    g = load_rows(grad, tokens, g_l * UNIT, live, D, DP)
                s = tl.dot(x, tl.trans(b_k), input_precision=PRECISION)  # [BM, DP] @ [DP, BN] -> [BM, BN]
                dp = tl.dot(g, tl.trans(b_v), input_precision=PRECISION)  # [BM, DP] @ [DP, BN] -> [BM, BN]
                p = tl.where(seen[None, :], weights_of(s, scale, shift[:, None], PRECISION), 0.0)
                ds = (p * (dp - delta[:, None])).to(b_k.dtype)
                acc = tl.dot(ds, b_k, acc, input_precision=PRECISION)  # [BM, BN] @ [BN, DP] -> [BM, DP]
            store_rows(sums, tokens, acc, live, D, DP)

    tl.debug_barrier()
    for start in range(r * size, last, BM):
        tokens = start + tl.arange(0, BM)
        live = tokens < last
        store_rows(dq + bh * length * D, tokens, load_rows(sums, tokens, D, live, D, DP) * scale, live, D, DP)


@triton.jit(do_not_specialize=SIZES)
def vmoba_keys_kernel(q, k, v, order, bounds, own_tiles, lists, starts, lse, deltas, grad, dk, dv, q_b, q_h, q_l, k_b,
                      k_h, k_l, v_b, v_h, v_l, g_b, g_h, g_l, heads, length, chunks, ranges, tiles,
                      scale, ORDERED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
                      DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dK and dV of a tile of keys. Scores stand transposed, [BN, BM], so both sums run over their columns."""
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.load(own_tiles + 2 * at)
    if c < 0:
        return
    b, h = bh // heads, bh % heads
    positions = tl.load(own_tiles + 2 * at + 1) + tl.arange(0, BN)
    live = positions < tl.load(bounds + c + 1)
    own = tokens_at(order, positions, live, ORDERED)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    grad += (b * g_b + h * g_h) * UNIT
    lists += (bh * chunks + c) * length
    count = tl.load(starts + (bh * chunks + c) * (ranges + 1) + ranges)
    lse += bh * length
    deltas += bh * length

    b_k = load_rows(k, own, k_l * UNIT, live, D, DP)
    b_v = load_rows(v, own, v_l * UNIT, live, D, DP)
    acc_k, acc_v = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    for start in range(0, count, BM):
        i = start + tl.arange(0, BM)
        valid = i < count
        tokens = tl.load(lists + i, mask=valid, other=0)
        b_q = load_rows(q, tokens, q_l * UNIT, valid, D, DP)
        b_do = load_rows(grad, tokens, g_l * UNIT, valid, D, DP)
        shift = tl.load(lse + tokens, mask=valid, other=float("inf"))  # no query there: P = 0
        delta = tl.load(deltas + tokens, mask=valid, other=0.0)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, DP] @ [DP, BM] -> [BN, BM]
        p = weights_of(s, scale, shift[None, :], PRECISION)
        acc_v = tl.dot(p.to(b_do.dtype), b_do, acc_v, input_precision=PRECISION)  # [BN, BM] @ [BM, DP] -> [BN, DP]
        dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, DP] @ [DP, BM] -> [BN, BM]
        ds = p * (dp - delta[None, :])
        acc_k = tl.dot(ds.to(b_q.dtype), b_q, acc_k, input_precision=PRECISION)  # [BN, BM] @ [BM, DP] -> [BN, DP]
    store_rows(dk + bh * length * D, own, acc_k * scale, live, D, DP)
    store_rows(dv + bh * length * D, own, acc_v, live, D, DP)


# ------------------------------------------------------------------------------------------------ launchers

def _dots(o: Tensor, grad: Tensor) -> Tensor:
    """rowsum(dO O), float32 [B, H, S]."""
    batch, heads, length, dim = o.shape
    out, rows = o.new_empty(o.shape[:3], dtype=torch.float32), 16
    tiles = blocks_of(length, rows)
    unit, strides = strides_of(o, grad)
    vmoba_dots_kernel[(batch * heads * tiles,)](o, grad, out, *strides, heads, length, tiles, UNIT=unit, D=dim,
                                                DP=padded(dim), ROWS=rows, num_warps=4)
    return out


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, order: Tensor | None,
             bounds: Tensor, mask: Tensor):
    """(dq, dk, dv) as `triskele.ops.vmoba.reference.attention_backward`, P from the saved lse."""
    batch, heads, length, dim = q.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() == 0:
        return dq, dk, dv
    grad, q, k, v = row_major(grad), row_major(q), row_major(k), row_major(v)
    lse, chunks, queries = lse.contiguous(), mask.shape[1], chunk_queries(mask, order, bounds)
    deltas = _dots(row_major(out), grad)
    unit, strides = strides_of(q, k, v, grad)
    places = bounds if order is None else order
    flags = {"ORDERED": order is not None, "UNIT": unit, "PRECISION": precision(q), "D": dim, "DP": padded(dim)}

    tile = tile_of(VMOBA_BACKWARD_Q, q)
    sums = q.new_empty(q.shape, dtype=torch.float32)
    vmoba_queries_kernel[(batch * heads * queries.ranges,)](
        q, k, v, places, bounds, queries.lists, queries.starts, lse, deltas, grad, sums, dq, *strides, heads, length,
        chunks, queries.ranges, queries.size, dim ** -0.5, HELD=q.element_size() < 4, BM=tile.rows, BN=tile.cols,
        **flags, **tile.options)

    tile = tile_of(VMOBA_BACKWARD_K, q)
    own = key_tiles(bounds, length, tile.cols)
    vmoba_keys_kernel[(batch * heads * own.shape[0],)](
        q, k, v, places, bounds, own, queries.lists, queries.starts, lse, deltas, grad, dk, dv, *strides, heads, length,
        chunks, queries.ranges, own.shape[0], dim ** -0.5, BM=tile.rows, BN=tile.cols, **flags, **tile.options)
    return dq, dk, dv
