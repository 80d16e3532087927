"""SLA forward: o = softmax over critical keys of (scale q k^T) v  +  [phi(q) H / (phi(q) Z + eps)] W^T + b.

One program takes a tile of queries, walks its row's list of critical key blocks with an online softmax, and adds the
linear branch in the epilogue, where the tile's output still is in registers. The projection is folded into H
beforehand, so without `parts` o_linear never exists.

    alpha given:   o = alpha o_sparse + (1 - alpha) o_linear
    lse            natural logarithm, float32; -inf and o_sparse = 0 where a query sees no critical key
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels import configs
from triskele.triton_kernels.sla_common import (
    FEATURES,
    LN2,
    LOG2E,
    add_state,
    as_bytes,
    blocks_of,
    chunk_of,
    dot_rows,
    load_rows,
    load_vector,
    padded,
    precision,
    reciprocal,
    row_major,
    rows_times_sum,
    store_rows,
    strides_of,
    tile_key,
)
from triskele.triton_kernels.sla_linear import key_states
from triskele.triton_kernels.sla_route import row_lists

SIZES = ["heads", "lq", "lk", "nq", "nk", "block_q", "block_k", "tiles_q", "tiles_k", "mask_b", "scale", "eps"]
EPS = {"all": 1e-5, "complement": 0.0, "marginal": 0.0}


@triton.jit
def _attend(acc, top, total, b_q, q, rows, q_l, live, k, v, key_mask, first, stop, k_l, v_l, scale,
            MASKED: tl.constexpr, HAS_MASK: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
            D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr):
    """One key tile of the online softmax. scale >= 0, in units of log2."""
    cols = first + tl.arange(0, BN)
    seen = cols < stop
    if HAS_MASK:
        seen = seen & (tl.load(key_mask + cols, mask=seen, other=0) != 0)
    if PRECISION == "tf32x3":
        s = dot_rows(q, rows, q_l, live, k, cols, k_l, seen, PRECISION, D, BM, BN, CHUNK)
    else:
        b_k = load_rows(k, cols, k_l, seen, D, DP, not MASKED)
        s = tl.dot(b_q, tl.trans(b_k))  # [BM, DP] @ [DP, BN] -> [BM, BN]
    if NEGATIVE:
        s = -s
    if MASKED:
        s = s * scale + tl.where(seen, 0.0, float("-inf"))[None, :]
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: exp2(-inf - 0), not exp2(-inf + inf)
        p = tl.exp2(s - shift[:, None])
    else:
        new = tl.maximum(top, tl.max(s, 1) * scale)
        shift = new
        p = tl.exp2(s * scale - shift[:, None])
    decay = tl.exp2(top - shift)
    b_v = load_rows(v, cols, v_l, seen, D, DP, not MASKED)
    acc = acc * decay[:, None]
    acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)  # [BM, BN] @ [BN, DP] -> [BM, DP]
    return acc, new, total * decay + tl.sum(p, 1)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(q, k, v, lists, counts, units, scales, folded_units, folded_scales, sums, bias, alpha, key_mask, o,
                   o_sparse, o_linear, lse, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b, heads, lq, lk, nq, nk,
                   block_q, block_k, tiles_q, tiles_k, scale, eps,
                   UNIT: tl.constexpr, HAS_MASK: tl.constexpr, WHOLE: tl.constexpr, NEGATIVE: tl.constexpr,
                   LINEAR: tl.constexpr, PROJECT: tl.constexpr, HAS_BIAS: tl.constexpr, MIX: tl.constexpr,
                   PARTS: tl.constexpr, PER_ROW: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
                   D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr):
    """WHOLE: a key block is one tile. PROJECT: o takes the folded states. PER_ROW: a state for every row of blocks, not
    for the head."""
    tiles = nq * tiles_q
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h, i = bh // heads, bh % heads, at // tiles_q
    rows = i * block_q + (at % tiles_q) * BM + tl.arange(0, BM)
    live = rows < tl.minimum((i + 1) * block_q, lq)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    q_l *= UNIT
    k_l *= UNIT
    v_l *= UNIT
    key_mask += b * mask_b
    row = bh * nq + i
    lists += row * nk
    count = tl.load(counts + row)

    b_q = load_rows(q, rows, q_l, live, D, DP)
    acc, total = tl.zeros([BM, DP], tl.float32), tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    if WHOLE and not HAS_MASK:
        last = tl.load(lists + count - 1, mask=count > 0, other=0)  # lists ascend: only the last block may be short
        full = count - ((count > 0) & ((last + 1) * block_k > lk)).to(tl.int32)
        for t in range(0, full):
            first = tl.load(lists + t) * BN
            acc, top, total = _attend(acc, top, total, b_q, q, rows, q_l, live, k, v, key_mask, first, lk, k_l, v_l,
                                      scale, False, False, NEGATIVE, PRECISION, D, DP, BM, BN, CHUNK)
        if full < count:
            acc, top, total = _attend(acc, top, total, b_q, q, rows, q_l, live, k, v, key_mask, last * BN, lk, k_l,
                                      v_l, scale, True, False, NEGATIVE, PRECISION, D, DP, BM, BN, CHUNK)
    else:
        for t in range(0, count * tiles_k):
            j = tl.load(lists + t // tiles_k)
            acc, top, total = _attend(acc, top, total, b_q, q, rows, q_l, live, k, v, key_mask,
                                      j * block_k + (t % tiles_k) * BN, tl.minimum((j + 1) * block_k, lk), k_l, v_l,
                                      scale, True, HAS_MASK, NEGATIVE, PRECISION, D, DP, BM, BN, CHUNK)
    acc *= reciprocal(total)[:, None]
    tl.store(lse + bh * lq + rows, tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * LN2), mask=live)

    out = bh * lq * D
    if PARTS:
        store_rows(o_sparse + out, rows, acc, live, D, DP)
    if LINEAR:
        state = (row if PER_ROW else bh) * D
        n, x_top, inverse = rows_times_sum(q, rows, q_l, live, sums + state, FEATURE, D, BM, CHUNK)
        factor = reciprocal(n + eps)
        if PARTS or MIX:
            linear = add_state(tl.zeros([BM, DP], tl.float32), q, rows, q_l, live, x_top, inverse, factor,
                               units + state * D, scales + state, FEATURE, PRECISION, D, DP, CHUNK)
            if PARTS:
                store_rows(o_linear + out, rows, linear, live, D, DP)
            if MIX:
                mix = tl.load(alpha + bh * lq + rows, mask=live, other=0.0)[:, None]
                acc = mix * acc + (1.0 - mix) * linear
        if PROJECT:
            acc = add_state(acc, q, rows, q_l, live, x_top, inverse, factor, folded_units + state * D,
                            folded_scales + state, FEATURE, PRECISION, D, DP, CHUNK)
        if HAS_BIAS:
            acc += load_vector(bias, D, DP)[None, :]
    store_rows(o + out, rows, acc, live, D, DP)


def forward(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, weight: Tensor | None, bias: Tensor | None,
            alpha: Tensor | None, key_mask: Tensor | None, settings, parts: bool):
    """(o, o_sparse, o_linear, lse) as `triskele.ops.sla.reference.forward`; the middle ones empty unless `parts`."""
    batch, heads, lq, dim = q.shape
    lk, shape = k.shape[2], (batch, heads, lq, dim)
    o, lse = q.new_empty(shape), q.new_empty(shape[:3], dtype=torch.float32)
    o_sparse, o_linear = (q.new_empty(shape if parts else (0,)) for _ in range(2))
    if o.numel() == 0:
        return o, o_sparse, o_linear, lse
    q, k, v, block_map, key_mask = row_major(q), row_major(k), row_major(v), block_map.contiguous(), as_bytes(key_mask)
    weight, bias, alpha = (None if x is None else x.to(torch.float32).contiguous() for x in (weight, bias, alpha))
    linear = parts or weight is not None or alpha is not None
    lists, counts = row_lists(block_map)
    tile = configs.lookup(configs.SLA_FORWARD, q.device, *tile_key(q))
    states = folded = sums = (q, lse)  # not read without a linear branch
    if linear:
        states, folded, sums = key_states(k, v, block_map, key_mask, settings.block_k, settings.feature_map,
                                          settings.scope, weight, parts or weight is None)
    unit, strides = strides_of(q, k, v)
    nq, tiles_q = block_map.shape[2], blocks_of(settings.block_q, tile.rows)
    forward_kernel[(batch * heads * nq * tiles_q,)](
        q, k, v, lists, counts, *states, *folded, sums, lse if bias is None else bias, lse if alpha is None else alpha,
        counts if key_mask is None else key_mask, o, o_sparse if parts else o, o_linear if parts else o, lse,
        *strides, lk, heads, lq, lk, nq, block_map.shape[3],
        settings.block_q, settings.block_k, tiles_q, blocks_of(settings.block_k, tile.cols),
        abs(settings.scale) * LOG2E.value, EPS[settings.scope],
        UNIT=unit, HAS_MASK=key_mask is not None, WHOLE=settings.block_k == tile.cols, NEGATIVE=settings.scale < 0,
        LINEAR=linear, PROJECT=weight is not None, HAS_BIAS=bias is not None, MIX=alpha is not None, PARTS=parts,
        PER_ROW=settings.scope != "all", FEATURE=FEATURES.index(settings.feature_map), PRECISION=precision(q), D=dim,
        DP=padded(dim), BM=tile.rows, BN=tile.cols, CHUNK=chunk_of(q), **tile.options)
    return o, o_sparse, o_linear, lse
