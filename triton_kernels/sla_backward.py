"""SLA backward: (dq, dk, dv) from the gradients of o_sparse, o_linear and lse.

    P = exp(scale q k^T - lse), dS = P (dO_s V^T - D_s), D_s = rowsum(dO_s O_s) - dlse
    dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO_s                                       over critical blocks
    dphi(Q) = (dO_l H^T - D_l Z^T) / n, dphi(K) = V dh^T + dz, dV gets phi(K) dh            over the scope

One pass owns tiles of queries and walks row lists, the other owns tiles of keys and walks column lists: no atomics, the
same bits on every run. The states of the linear branch are computed anew, from the keys and then from the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels import configs
from triskele.triton_kernels.sla_common import (
    FEATURES,
    LOG2E,
    add_state,
    as_bytes,
    blocks_of,
    chunk_of,
    dot_rows,
    load_rows,
    load_vector,
    padded,
    phi,
    phi_backward,
    precision,
    reciprocal,
    row_major,
    rows_times_sum,
    store_rows,
    strides_of,
    tile_key,
    times_units,
)
from triskele.triton_kernels.sla_forward import EPS
from triskele.triton_kernels.sla_linear import key_states, query_states
from triskele.triton_kernels.sla_route import column_lists, row_lists

SIZES = ["heads", "lq", "lk", "nq", "nk", "block_q", "block_k", "tiles_q", "tiles_k", "mask_b", "scale", "eps", "rows"]


@triton.jit(do_not_specialize=SIZES)
def dots_kernel(a, grad, extra, out, copy, rows, HAS_EXTRA: tl.constexpr, COPY: tl.constexpr, D: tl.constexpr,
                DP: tl.constexpr, ROWS: tl.constexpr):
    """out = rowsum(a * grad) - extra over contiguous rows; and grad in a's dtype, which the matrix units take."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < rows
    g = load_rows(grad, at, D, live, D, DP)
    total = tl.sum(load_rows(a, at, D, live, D, DP).to(tl.float32) * g.to(tl.float32), 1)
    if HAS_EXTRA:
        total -= tl.load(extra + at, mask=live, other=0.0)
    tl.store(out + at, total, mask=live)
    if COPY:
        store_rows(copy, at, g, live, D, DP)


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(q, k, v, lists, counts, lse, offset, d_sparse, d_linear, d_rows, units, scales, sums, key_mask, dq,
                   q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b, heads, lq, lk, nq, nk, block_q, block_k,
                   tiles_q, tiles_k, scale, eps,
                   UNIT: tl.constexpr, HAS_MASK: tl.constexpr, LINEAR: tl.constexpr, PER_ROW: tl.constexpr,
                   FEATURE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, CHUNK: tl.constexpr):
    """dQ of a tile of queries. The linear branch comes first, while the loop's registers are free."""
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
    row, flat = bh * nq + i, bh * lq
    lists += row * nk
    count = tl.load(counts + row)

    d_sparse += flat * D
    acc = tl.zeros([BM, DP], tl.float32)
    if LINEAR:
        inside = (tl.arange(0, DP) < D)[None, :]
        state = (row if PER_ROW else bh) * D
        df = times_units(d_linear + flat * D, rows, D, live, units + state * D, PRECISION, D, DP, BM, CHUNK)
        n, top, inverse = rows_times_sum(q, rows, q_l, live, sums + state, FEATURE, D, BM, CHUNK)
        x = load_rows(q, rows, q_l, live, D, DP).to(tl.float32)
        f = phi(x, top, inverse, inside, FEATURE)
        z = load_vector(sums + state, D, DP)[None, :]
        b_rows = tl.load(d_rows + flat + rows, mask=live, other=0.0)
        df = (df * load_vector(scales + state, D, DP)[None, :] - b_rows[:, None] * z) * reciprocal(n + eps)[:, None]
        acc = phi_backward(x, f, df, FEATURE)

    b_q = load_rows(q, rows, q_l, live, D, DP)
    b_do = load_rows(d_sparse, rows, D, live, D, DP)
    shift = tl.load(lse + flat + rows, mask=live, other=0.0) * LOG2E
    b_offset = tl.load(offset + flat + rows, mask=live, other=0.0) * scale
    for t in range(0, count * tiles_k):
        j = tl.load(lists + t // tiles_k)
        cols = j * block_k + (t % tiles_k) * BN + tl.arange(0, BN)
        seen = cols < tl.minimum((j + 1) * block_k, lk)
        if HAS_MASK:
            seen = seen & (tl.load(key_mask + cols, mask=seen, other=0) != 0)
        b_k = load_rows(k, cols, k_l, seen, D, DP)
        if PRECISION == "tf32x3":
            s = dot_rows(q, rows, q_l, live, k, cols, k_l, seen, PRECISION, D, BM, BN, CHUNK)
            dp = dot_rows(d_sparse, rows, D, live, v, cols, v_l, seen, PRECISION, D, BM, BN, CHUNK)
        else:
            b_v = load_rows(v, cols, v_l, seen, D, DP)
            s = tl.dot(b_q, tl.trans(b_k))  # [BM, DP] @ [DP, BN] -> [BM, BN]
            dp = tl.dot(b_do, tl.trans(b_v))  # [BM, DP] @ [DP, BN] -> [BM, BN]
        p = tl.where(seen[None, :], tl.exp2(s * (scale * LOG2E) - shift[:, None]), 0.0)
        ds = p * (dp * scale - b_offset[:, None])
        acc = tl.dot(ds.to(b_k.dtype), b_k, acc, input_precision=PRECISION)  # [BM, BN] @ [BN, DP] -> [BM, DP]
    # (a row that sees no key has lse = -inf: its p is 0 by `seen`)
    store_rows(dq + flat * D, rows, acc, live, D, DP)


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(q, k, v, lists, counts, lse, offset, d_sparse, units, scales, sums, key_mask, dk, dv,
                q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b, heads, lq, lk, nq, nk, block_q, block_k, tiles_q,
                tiles_k, scale,
                UNIT: tl.constexpr, HAS_MASK: tl.constexpr, LINEAR: tl.constexpr, PER_ROW: tl.constexpr,
                FEATURE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, CHUNK: tl.constexpr):
    """dK and dV of a tile of keys, the linear branch first. Scores stand transposed, [BN, BM]: both sums run over their
    columns."""
    tiles = nk * tiles_k
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h, j = bh // heads, bh % heads, at // tiles_k
    cols = j * block_k + (at % tiles_k) * BN + tl.arange(0, BN)
    live = cols < tl.minimum((j + 1) * block_k, lk)
    seen = live
    if HAS_MASK:
        seen = live & (tl.load(key_mask + b * mask_b + cols, mask=live, other=0) != 0)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    q_l *= UNIT
    k_l *= UNIT
    v_l *= UNIT
    column, flat = bh * nk + j, bh * lq
    lists += column * nq
    count = tl.load(counts + column)
    d_sparse += flat * D
    lse += flat
    offset += flat

    acc_k, acc_v = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    if LINEAR:
        inside = (tl.arange(0, DP) < D)[None, :]
        state = (column if PER_ROW else bh) * D
        df = times_units(v, cols, v_l, seen, units + state * D, PRECISION, D, DP, BN, CHUNK)
        df = df * load_vector(scales + state, D, DP)[None, :] + load_vector(sums + state, D, DP)[None, :]
        _, top, inverse = rows_times_sum(k, cols, k_l, seen, sums + state, FEATURE, D, BN, CHUNK)
        x = load_rows(k, cols, k_l, seen, D, DP).to(tl.float32)
        acc_k = phi_backward(x, phi(x, top, inverse, inside, FEATURE), df, FEATURE)
        acc_v = add_state(acc_v, k, cols, k_l, seen, top, inverse, tl.full([BN], 1.0, tl.float32), units + state * D,
                          scales + state, FEATURE, PRECISION, D, DP, CHUNK)

    b_k = load_rows(k, cols, k_l, seen, D, DP)
    b_v = load_rows(v, cols, v_l, seen, D, DP)
    for t in range(0, count * tiles_q):
        i = tl.load(lists + t // tiles_q)
        rows = i * block_q + (t % tiles_q) * BM + tl.arange(0, BM)
        valid = rows < tl.minimum((i + 1) * block_q, lq)
        b_q = load_rows(q, rows, q_l, valid, D, DP)
        b_do = load_rows(d_sparse, rows, D, valid, D, DP)
        shift = tl.load(lse + rows, mask=valid, other=float("inf")) * LOG2E
        shift = tl.where(shift == float("-inf"), float("inf"), shift)  # a row that sees no key: p = 0
        b_offset = tl.load(offset + rows, mask=valid, other=0.0) * scale
        if PRECISION == "tf32x3":
            s = dot_rows(k, cols, k_l, seen, q, rows, q_l, valid, PRECISION, D, BN, BM, CHUNK)
        else:
            s = tl.dot(b_k, tl.trans(b_q))  # [BN, DP] @ [DP, BM] -> [BN, BM]
        p = tl.exp2(s * (scale * LOG2E) - shift[None, :])
        acc_v = tl.dot(p.to(b_do.dtype), b_do, acc_v, input_precision=PRECISION)  # [BN, BM] @ [BM, DP] -> [BN, DP]
        if PRECISION == "tf32x3":
            dp = dot_rows(v, cols, v_l, seen, d_sparse, rows, D, valid, PRECISION, D, BN, BM, CHUNK)
        else:
            dp = tl.dot(b_v, tl.trans(b_do))  # [BN, DP] @ [DP, BM] -> [BN, BM]
        ds = p * (dp * scale - b_offset[None, :])
        acc_k = tl.dot(ds.to(b_q.dtype), b_q, acc_k, input_precision=PRECISION)  # [BN, BM] @ [BM, DP] -> [BN, DP]
    store_rows(dk + bh * lk * D, cols, tl.where(seen[:, None], acc_k, 0.0), live, D, DP)
    store_rows(dv + bh * lk * D, cols, tl.where(seen[:, None], acc_v, 0.0), live, D, DP)


# ------------------------------------------------------------------------------------------------ launchers

def _dots(a: Tensor, grad: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rowsum(a * grad) - extra, float32 [B, H, L]; grad in a's dtype, contiguous)."""
    a, grad = a.contiguous(), grad.contiguous()
    out = a.new_empty(a.shape[:3], dtype=torch.float32)
    copy = grad if grad.dtype == a.dtype else torch.empty_like(a)
    dim, rows = a.shape[3], 32
    extra = None if extra is None else extra.to(torch.float32).contiguous()
    dots_kernel[(blocks_of(out.numel(), rows),)](
        a, grad, out if extra is None else extra, out, copy, out.numel(), HAS_EXTRA=extra is not None,
        COPY=copy is not grad, D=dim, DP=padded(dim), ROWS=rows, num_warps=4)
    return out, copy


def backward(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, o_sparse: Tensor, o_linear: Tensor | None, lse: Tensor,
             d_sparse: Tensor, d_linear: Tensor | None, d_lse: Tensor | None, key_mask: Tensor | None, settings):
    """(dq, dk, dv) as `triskele.ops.sla.reference.backward`."""
    batch, heads, lq, dim = q.shape
    lk, scope = k.shape[2], settings.scope
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, block_map, key_mask = row_major(q), row_major(k), row_major(v), block_map.contiguous(), as_bytes(key_mask)
    offset, d_sparse = _dots(o_sparse, d_sparse, d_lse)
    lse, linear = lse.contiguous(), d_linear is not None
    d_rows, states, sums = lse, (q, lse), lse  # not read without a linear branch
    if linear:
        d_rows, d_linear = _dots(o_linear, d_linear, None)
        states, _, sums = key_states(k, v, block_map, key_mask, settings.block_k, settings.feature_map, scope)
    unit, strides = strides_of(q, k, v)
    nq, nk = block_map.shape[2:]
    sizes = lk, heads, lq, lk, nq, nk, settings.block_q, settings.block_k
    flags = {"UNIT": unit, "HAS_MASK": key_mask is not None, "LINEAR": linear, "PER_ROW": scope != "all",
             "PRECISION": precision(q), "FEATURE": FEATURES.index(settings.feature_map), "D": dim, "DP": padded(dim),
             "CHUNK": chunk_of(q)}

    lists, counts = row_lists(block_map)
    mask = counts if key_mask is None else key_mask
    tile = configs.lookup(configs.SLA_QUERIES, q.device, *tile_key(q))
    tiles_q, tiles_k = blocks_of(settings.block_q, tile.rows), blocks_of(settings.block_k, tile.cols)
    queries_kernel[(batch * heads * nq * tiles_q,)](
        q, k, v, lists, counts, lse, offset, d_sparse, d_linear if linear else d_sparse, d_rows, *states, sums,
        mask, dq, *strides, *sizes, tiles_q, tiles_k, settings.scale, EPS[scope], BM=tile.rows, BN=tile.cols, **flags,
        **tile.options)

    if linear:
        states, sums = query_states(q, d_linear, d_rows, sums, block_map, settings.block_q, lk, settings.feature_map,
                                    scope, EPS[scope])
    lists, counts = column_lists(block_map)
    tile = configs.lookup(configs.SLA_KEYS, q.device, *tile_key(q))
    tiles_q, tiles_k = blocks_of(settings.block_q, tile.rows), blocks_of(settings.block_k, tile.cols)
    keys_kernel[(batch * heads * nk * tiles_k,)](
        q, k, v, lists, counts, lse, offset, d_sparse, *states, sums, mask, dk, dv, *strides, *sizes, tiles_q,
        tiles_k, settings.scale, BM=tile.rows, BN=tile.cols, **flags, **tile.options)
    return dq, dk, dv
