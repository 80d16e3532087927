"""VMoBA forward: o_s = softmax(q_s K_A^T / sqrt(D)) V_A, A the tokens of the chunks that s sees; lse in natural log.

One program owns a range of queries of one head and walks the chunks. Of a chunk's list it takes the queries of its
range in dense tiles, loads their rows and what they have summed up so far, runs over the chunk's keys, and puts the
sums back. So only selected products are computed, whatever the pattern: over the union of the chunks that neighbours
see, tiles would compute several times as much (docs/attention.md). The sums, float32, stay with one program: no
atomics, and a row's result does not depend on the rows gathered with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.configs import VMOBA_FORWARD
from triskele.triton_kernels.sla_common import LN2, LOG2E, load_rows, padded, precision, row_major, store_rows
from triskele.triton_kernels.vmoba_common import SIZES, strides_of, tile_of, tokens_at, weights_of
from triskele.triton_kernels.vmoba_lists import chunk_queries


@triton.jit(do_not_specialize=SIZES)
def vmoba_forward_kernel(q, k, v, order, bounds, lists, starts, sums, tops, totals, o, lse, q_b, q_h, q_l, k_b, k_h,
                         k_l, v_b, v_h, v_l, heads, length, chunks, ranges, size, scale,
                         ORDERED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
                         DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A range of queries."""
    r, bh = tl.program_id(0) % ranges, (tl.program_id(0) // ranges).to(tl.int64)
    b, h = bh // heads, bh % heads
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    sums += bh * length * D
    tops += bh * length
    totals += bh * length
    last = tl.minimum((r + 1) * size, length)

    for start in range(r * size, last, BM):
        tokens = start + tl.arange(0, BM)
        live = tokens < last
        store_rows(sums, tokens, tl.zeros([BM, DP], tl.float32), live, D, DP)
        tl.store(tops + tokens, tl.full([BM], float("-inf"), tl.float32), mask=live)
        tl.store(totals + tokens, tl.zeros([BM], tl.float32), mask=live)

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
            b_q = load_rows(q, tokens, q_l * UNIT, live, D, DP)
            acc = load_rows(sums, tokens, D, live, D, DP)
            top = tl.load(tops + tokens, mask=live, other=float("-inf"))
            total = tl.load(totals + tokens, mask=live, other=0.0)
            for key in range(first, stop, BN):
                positions = key + tl.arange(0, BN)
                seen = positions < stop
                keys = tokens_at(order, positions, seen, ORDERED)
                b_k = load_rows(k, keys, k_l * UNIT, seen, D, DP)
                s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, DP] @ [DP, BN] -> [BM, BN]
                s = tl.where(seen[None, :], s, float("-inf"))
                new = tl.maximum(top, tl.max(s, 1) * scale)
                shift = tl.where(new == float("-inf"), 0.0, new)  # all -inf so far: exp2(-inf - 0), not of NaN
                p = weights_of(s, scale, shift[:, None], PRECISION)
                decay = tl.exp2((top - shift) * LOG2E)
                total = total * decay + tl.sum(p, 1)
                top = new
                b_v = load_rows(v, keys, v_l * UNIT, seen, D, DP)
                acc = acc * decay[:, None]
                acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)  # [BM, BN] @ [BN, DP] -> [BM, DP]
            store_rows(sums, tokens, acc, live, D, DP)
            tl.store(tops + tokens, top, mask=live)
            tl.store(totals + tokens, total, mask=live)

    tl.debug_barrier()
    for start in range(r * size, last, BM):
        tokens = start + tl.arange(0, BM)
        live = tokens < last
        total = tl.load(totals + tokens, mask=live, other=1.0)
        top = tl.load(tops + tokens, mask=live, other=0.0)
        acc = load_rows(sums, tokens, D, live, D, DP)
        store_rows(o + bh * length * D, tokens, acc / total[:, None], live, D, DP)
        tl.store(lse + bh * length + tokens, top + tl.log2(total) * LN2, mask=live)


def forward(q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, bounds: Tensor, mask: Tensor):
    """(o, lse) as `triskele.ops.vmoba.reference.attention`."""
    batch, heads, length, dim = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    q, k, v = row_major(q), row_major(k), row_major(v)
    queries = chunk_queries(mask, order, bounds)
    sums = q.new_empty(q.shape, dtype=torch.float32)
    tops, totals = torch.empty_like(lse), torch.empty_like(lse)
    tile = tile_of(VMOBA_FORWARD, q)
    unit, strides = strides_of(q, k, v)
    vmoba_forward_kernel[(batch * heads * queries.ranges,)](
        q, k, v, bounds if order is None else order, bounds, queries.lists, queries.starts, sums, tops, totals, o, lse,
        *strides, heads, length, mask.shape[1], queries.ranges, queries.size, dim ** -0.5,
        ORDERED=order is not None, UNIT=unit, PRECISION=precision(q), D=dim, DP=padded(dim), BM=tile.rows,
        BN=tile.cols, **tile.options)
    return o, lse
