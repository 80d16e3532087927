"""The states of the linear branch: sums of outer products over blocks, then over the blocks of a scope.

    keys      h_j  = phi(K_j)^T V_j              z_j  = sum of phi(K_j)             H_i  = sum of h_j, j in scope of i
    queries   dH_i = (phi(Q_i) / n)^T dO_l       dZ_i = -(phi(Q_i) / n)^T D_l       dh_j = sum of dH_i, i that cover j

Both directions take the same two steps. In scope `all` a head has one state, summed from a few long runs of tokens; in
the others each row of blocks has its own, a product of the map's zeros and ones with the blocks' states. (The sum over
all blocks minus that over the critical ones would be cheaper, and would leave rounding noise where the rest is small.)

A state H is kept as unit rows in the inputs' dtype and a float32 scale for each, H[d] = scale[d] * unit[d]: float16
holds any state so, however long the sequence. With a projection W there is a second one, H W^T ("folded").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels import configs
from triskele.triton_kernels.sla_common import (
    FEATURES,
    SCOPES,
    blocks_of,
    load_columns,
    load_rows,
    load_square,
    load_vector,
    padded,
    phi,
    precision,
    reciprocal,
    row_stats,
    strides_of,
    tile_key,
)

SIZES = ["heads", "lq", "lk", "length", "runs", "run", "nr", "nc", "mask_b", "row_stride", "col_stride", "eps", "unit"]


@triton.jit
def _store_state(h, z, at, part, acc, sums, D: tl.constexpr, DP: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, DP)[:, None], (part * COLS + tl.arange(0, COLS))[None, :]
    tl.store(h + at * D * D + rows * D + cols, acc, mask=(rows < D) & (cols < D))
    cols = tl.arange(0, DP)
    tl.store(z + at * D + cols, sums, mask=(cols < D) & (cols >= part * DP))  # the first part alone


@triton.jit(do_not_specialize=SIZES)
def key_states_kernel(k, v, key_mask, h, z, k_b, k_h, k_l, v_b, v_h, v_l, mask_b, heads, length, runs, run,
                      UNIT: tl.constexpr, HAS_MASK: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
                      D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COLS columns of h, and z, of a run of keys."""
    part, place = tl.program_id(0) % (DP // COLS), tl.program_id(0) // (DP // COLS)
    at, bh = place % runs, (place // runs).to(tl.int64)
    b, i_h = bh // heads, bh % heads
    k += (b * k_b + i_h * k_h) * UNIT
    v += (b * v_b + i_h * v_h) * UNIT
    k_l *= UNIT
    v_l *= UNIT
    inside = (tl.arange(0, DP) < D)[None, :]
    start = at * run
    stop = tl.minimum(start + run, length)
    acc, sums = tl.zeros([DP, COLS], tl.float32), tl.zeros([DP], tl.float32)
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        seen = rows < stop
        if HAS_MASK:
            seen = seen & (tl.load(key_mask + b * mask_b + rows, mask=seen, other=0) != 0)
        x = load_rows(k, rows, k_l, seen, D, DP).to(tl.float32)
        top, inverse = row_stats(x, inside, FEATURE)
        x = phi(x, top, inverse, inside, FEATURE)
        x = tl.where(seen[:, None], x, 0.0)  # phi(0) is not 0
        y = load_columns(v, rows, v_l, seen, part * COLS, D, COLS)
        acc += tl.dot(tl.trans(x.to(y.dtype)), y, input_precision=PRECISION)  # [DP, ROWS] @ [ROWS, COLS]
        sums += tl.sum(x, 0)
    _store_state(h, z, bh * runs + at, part, acc, sums, D, DP, COLS)


@triton.jit(do_not_specialize=SIZES)
def query_states_kernel(q, d_linear, d_rows, key_sums, h, z, q_b, q_h, q_l, heads, length, runs, run, eps, unit,
                        UNIT: tl.constexpr, PER_ROW: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
                        D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COLS columns of dH, and dZ, of a run of queries, times `unit`: phi / n alone would leave the range of float16."""
    part, place = tl.program_id(0) % (DP // COLS), tl.program_id(0) // (DP // COLS)
    at, bh = place % runs, (place // runs).to(tl.int64)
    q += (bh // heads * q_b + bh % heads * q_h) * UNIT
    q_l *= UNIT
    inside = (tl.arange(0, DP) < D)[None, :]
    state = bh * runs + at if PER_ROW else bh
    key_sum = load_vector(key_sums + state * D, D, DP)
    start = at * run
    stop = tl.minimum(start + run, length)
    acc, sums = tl.zeros([DP, COLS], tl.float32), tl.zeros([DP], tl.float32)
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        seen = rows < stop
        x = load_rows(q, rows, q_l, seen, D, DP).to(tl.float32)
        top, inverse = row_stats(x, inside, FEATURE)
        x = phi(x, top, inverse, inside, FEATURE)
        x *= (unit * reciprocal(tl.sum(x * key_sum[None, :], 1) + eps))[:, None]
        y = load_columns(d_linear + bh * length * D, rows, D, seen, part * COLS, D, COLS)  # zero where not seen
        acc += tl.dot(tl.trans(x.to(y.dtype)), y, input_precision=PRECISION)  # [DP, ROWS] @ [ROWS, COLS]
        sums -= tl.sum(x * tl.load(d_rows + bh * length + rows, mask=seen, other=0.0)[:, None], 0)
    _store_state(h, z, bh * runs + at, part, acc, sums, D, DP, COLS)


@triton.jit
def _store_units(units, scales, first, acc, unit, valid, D: tl.constexpr, DP: tl.constexpr):
    """acc [M, DP]: rows of states at the positions `first` [M], as unit rows and scales."""
    scale = tl.max(tl.abs(acc), 1)
    scale = tl.where(scale == 0, 1.0, scale)
    cols = tl.arange(0, DP)[None, :]
    tl.store(units + first[:, None] * D + cols, (acc / scale[:, None]).to(units.dtype.element_ty),
             mask=valid[:, None] & (cols < D))
    tl.store(scales + first, scale * unit, mask=valid)


@triton.jit
def _store_sum(units, scales, folded_units, folded_scales, weight, place, acc, unit, valid, PLAIN: tl.constexpr,
               FOLD: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    if PLAIN:
        _store_units(units, scales, place, acc, unit, valid, D, DP)
    if FOLD:  # [M, DP] @ [DP, DP] -> [M, DP]
        acc = tl.dot(acc, tl.trans(load_square(weight, D, DP)), input_precision=PRECISION)
        _store_units(folded_units, folded_scales, place, acc, unit, valid, D, DP)


@triton.jit(do_not_specialize=SIZES)
def sum_all_kernel(h, z, weight, units, scales, folded_units, folded_scales, sums, runs, unit, PLAIN: tl.constexpr,
                   FOLD: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of a head's one state: the sum over all runs."""
    tiles = tl.cdiv(D, ROWS)
    at, bh = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    rows, cols = at * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    valid = rows < D
    acc, total = tl.zeros([ROWS, DP], tl.float32), tl.zeros([ROWS], tl.float32)
    for run in range(0, runs):
        part = bh * runs + run
        acc += tl.load(h + part * D * D + rows[:, None] * D + cols[None, :], mask=valid[:, None] & (cols < D)[None, :],
                       other=0.0)
        total += tl.load(z + part * D + rows, mask=valid, other=0.0)
    _store_sum(units, scales, folded_units, folded_scales, weight, bh * D + rows, acc, unit, valid, PLAIN, FOLD,
               PRECISION, D, DP)
    tl.store(sums + bh * D + rows, total * unit, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def sum_scope_kernel(block_map, h, z, weight, units, scales, folded_units, folded_scales, sums, nr, nc, row_stride,
                     col_stride, unit, SCOPE: tl.constexpr, PLAIN: tl.constexpr, FOLD: tl.constexpr,
                     PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Row d of the states of BM blocks: (map in scope) [BM, nc] @ h[:, d] [nc, D].

    The map is [nr, nc] through its two strides, so the backward hands it over transposed."""
    tiles = tl.cdiv(nr, BM)
    d = tl.program_id(0) % D
    at, bh = (tl.program_id(0) // D) % tiles, (tl.program_id(0) // D // tiles).to(tl.int64)
    rows, cols = at * BM + tl.arange(0, BM), tl.arange(0, DP)
    valid = rows < nr
    block_map += bh * nr * nc
    acc, total = tl.zeros([BM, DP], tl.float32), tl.zeros([BM], tl.float32)
    for first in range(0, nc, BK):
        blocks = first + tl.arange(0, BK)
        some = blocks < nc
        kind = tl.load(block_map + rows.to(tl.int64)[:, None] * row_stride + blocks.to(tl.int64)[None, :] * col_stride,
                       mask=valid[:, None] & some[None, :], other=1)
        covered = (kind != 1 if SCOPE == 1 else kind == 0).to(tl.float32)
        part = bh * nc + blocks
        state = tl.load(h + (part * D + d)[:, None] * D + cols[None, :], mask=some[:, None] & (cols < D)[None, :],
                        other=0.0)
        acc += tl.dot(covered, state, input_precision=PRECISION)  # [BM, BK] @ [BK, DP] -> [BM, DP]
        total += tl.sum(covered * tl.load(z + part * D + d, mask=some, other=0.0)[None, :], 1)
    place = (bh * nr + rows) * D + d
    _store_sum(units, scales, folded_units, folded_scales, weight, place, acc, unit, valid, PLAIN, FOLD, PRECISION, D,
               DP)
    tl.store(sums + place, total * unit, mask=valid)


# ------------------------------------------------------------------------------------------------ launchers

State = tuple[Tensor, Tensor]
"""(units [B*H, N, D, D] in the inputs' dtype, scales float32 [B*H, N, D]); N is 1 in scope `all`."""


def _runs(length: int, block: int, scope: str, heads: int) -> tuple[int, int]:
    """(tokens of a run, runs a head): its blocks, or in scope `all` about 512 runs over all heads."""
    if scope == "all":
        block = max(64, blocks_of(blocks_of(length * heads, 512), 64) * 64)
    return block, blocks_of(length, block)


def _flags(x: Tensor) -> dict:
    return {"D": x.shape[3], "DP": padded(x.shape[3]), "PRECISION": precision(x)}


def _sum(x: Tensor, h: Tensor, z: Tensor, block_map: Tensor, scope: str, transposed: bool, weight: Tensor | None,
         plain: bool, unit: float) -> tuple[State, State, Tensor]:
    batch, heads, _, dim = x.shape
    nr, nc = block_map.shape[2:]
    strides = (nc, 1)
    if transposed:
        nr, nc, strides = nc, nr, (1, nc)
    count = 1 if scope == "all" else nr
    sums = x.new_empty((batch * heads, count, dim), dtype=torch.float32)
    unused = x, sums
    state, folded = ((x.new_empty((batch * heads, count, dim, dim)), torch.empty_like(sums)) if wanted else unused
                     for wanted in (plain, weight is not None))
    out = h if weight is None else weight, *state, *folded, sums
    flags = {"PLAIN": plain, "FOLD": weight is not None, **_flags(x)}
    if scope == "all":
        tile = configs.lookup(configs.SLA_SUM_ALL, x.device, *tile_key(x))
        sum_all_kernel[(batch * heads * blocks_of(dim, tile.rows),)](h, z, *out, h.shape[1], unit, ROWS=tile.rows,
                                                                     **flags, **tile.options)
    else:
        tile = configs.lookup(configs.SLA_SUM_SCOPE, x.device, *tile_key(x))
        sum_scope_kernel[(batch * heads * blocks_of(nr, tile.rows) * dim,)](
            block_map, h, z, *out, nr, nc, *strides, unit, SCOPE=SCOPES.index(scope), BM=tile.rows, BK=tile.depth,
            **flags, **tile.options)
    return state, folded, sums


def key_states(k: Tensor, v: Tensor, block_map: Tensor, key_mask: Tensor | None, block_k: int, feature_map: str,
               scope: str, weight: Tensor | None = None, plain: bool = True) -> tuple[State, State, Tensor]:
    """(H, H W^T, Z) of every row of blocks, or of the head: H where `plain`, H W^T where `weight` (float32, contiguous)
    is given."""
    batch, heads, lk, dim = k.shape
    run, runs = _runs(lk, block_k, scope, batch * heads)
    h = k.new_empty((batch * heads, runs, dim, dim), dtype=torch.float32)
    z = k.new_empty((batch * heads, runs, dim), dtype=torch.float32)
    if h.numel():
        (step, strides), tile = strides_of(k, v), configs.lookup(configs.SLA_STATES, k.device, *tile_key(k))
        cols = min(tile.cols, padded(dim))
        key_states_kernel[(batch * heads * runs * (padded(dim) // cols),)](
            k, v, k if key_mask is None else key_mask, h, z, *strides, lk, heads, lk, runs, run, UNIT=step,
            HAS_MASK=key_mask is not None, FEATURE=FEATURES.index(feature_map), ROWS=tile.rows, COLS=cols, **_flags(k),
            **tile.options)
    return _sum(k, h, z, block_map, scope, False, weight, plain, 1.0)


def query_states(q: Tensor, d_linear: Tensor, d_rows: Tensor, key_sums: Tensor, block_map: Tensor, block_q: int,
                 lk: int, feature_map: str, scope: str, eps: float) -> tuple[State, Tensor]:
    """(dh, dz) of every column of blocks, or of the head, from d_linear [B, H, Lq, D] and D_l [B, H, Lq]."""
    batch, heads, lq, dim = q.shape
    run, runs = _runs(lq, block_q, scope, batch * heads)
    h = q.new_empty((batch * heads, runs, dim, dim), dtype=torch.float32)
    z = q.new_empty((batch * heads, runs, dim), dtype=torch.float32)
    (step, strides), tile = strides_of(q), configs.lookup(configs.SLA_STATES, q.device, *tile_key(q))
    cols = min(tile.cols, padded(dim))
    query_states_kernel[(batch * heads * runs * (padded(dim) // cols),)](
        q, d_linear, d_rows, key_sums, h, z, *strides, heads, lq, runs, run, eps, float(lk), UNIT=step,
        PER_ROW=scope != "all", FEATURE=FEATURES.index(feature_map), ROWS=tile.rows, COLS=cols, **_flags(q),
        **tile.options)
    state, _, sums = _sum(q, h, z, block_map, scope, True, None, True, 1.0 / lk)
    return state, sums
