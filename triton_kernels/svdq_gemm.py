"""The 4-bit linear's products: y = scale_m Σ_g wscale[n, g] (Σ over group g of code a)  +  down lora_up^T  +  bias.

Both kernels make y^T tiles: packed weights are the left operand, which the matrix units take from registers, so a
weight is unpacked where it is multiplied and never stored again. A byte of `qweight` holds columns 2i and 2i + 1; a
group's activations are stored as its even columns, then its odd ones (svdq_prepare.py), so each half is a contiguous
operand of its own and no nibble moves to another byte.

    w4a8_kernel    int8 codes. A nibble stays in the byte's upper half: it reads as 16 code, signed, at the cost of one
                   mask or one shift; the 16 goes into the token's scale. Sums of a group are exact int32
    w4a16_kernel   bfloat16 or tf32 activations (float32 ones as two tf32 planes: the weights are exact, so two products
                   are enough), or int8 codes in float16 (nvfp4). An int4 code is exact in every float
                   type and the group's scale multiplies the float32 sum; an e2m1 code times its e4m3 scale has 6
                   significant bits at most, exact too, so nvfp4 runs as one product

Each element of y is one sum over K in steps of a group, whatever the tile: its bits do not depend on the batch as long
as the chip's instruction for a step is the same, which the tile tables see to. No split over K, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.configs import Tile, svdq_gemm_tile

SIZES = ["m", "n", "groups", "steps", "rank", "parts", "tiles_m", "tiles_n"]
BAND = tl.constexpr(8)  # tiles of tokens that pass one tile of weights, while it is in L2
LOW = tl.constexpr(16)  # ranks at a time


@triton.jit
def _tile_of(pid, tiles_m, tiles_n):
    """(tile of tokens, tile of features): BAND tiles of tokens side by side."""
    width = BAND * tiles_n
    band = pid // width
    size = tl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + pid % width % size, pid % width // size


@triton.jit
def _finish(acc, y, down, lora_up, bias, rows_n, rows_m, m, n, rank, parts, HAS_BIAS: tl.constexpr,
            PRECISION: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """acc [BN, BM] + lora_up down^T + bias -> y. `down` holds `parts` summands [m, rank] each."""
    live_n, live_m = rows_n < n, rows_m < m
    at_n, at_m = rows_n.to(tl.int64), rows_m.to(tl.int64)
    for first in range(0, rank, LOW):
        ranks = first + tl.arange(0, LOW)
        inside = (ranks < rank)[None, :]
        up = tl.load(lora_up + at_n[:, None] * rank + ranks[None, :], mask=live_n[:, None] & inside, other=0.0)
        low = tl.zeros([BM, LOW], tl.float32)
        p_down = down + at_m[:, None] * rank + ranks[None, :]
        for _ in range(0, parts):
            low += tl.load(p_down, mask=live_m[:, None] & inside, other=0.0)
            p_down += m.to(tl.int64) * rank
        acc = tl.dot(up.to(tl.float32), tl.trans(low), acc, input_precision=PRECISION)  # [BN, R] @ [R, BM]
    if HAS_BIAS:
        acc += tl.load(bias + rows_n, mask=live_n, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at_m[:, None] * n + rows_n[None, :], tl.trans(acc).to(y.dtype.element_ty),
             mask=live_m[:, None] & live_n[None, :])


@triton.jit(do_not_specialize=SIZES)
def w4a8_kernel(codes, token_scales, down, qweight, wscales, lora_up, bias, y, m, n, groups, rank, tiles_m, tiles_n,
                HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr,
                BM: tl.constexpr):
    """int4 weights [n, groups, HALF] bytes, int8 codes [m, groups, 2, HALF]."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tiles_m, tiles_n)
    rows_n, rows_m = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    half = tl.arange(0, HALF)[None, :]
    at_n = tl.minimum(rows_n, n - 1).to(tl.int64) * groups  # rows beyond the end repeat the last: no mask in the loop
    at_m = tl.minimum(rows_m, m - 1).to(tl.int64) * groups
    p_w = qweight + (at_n * HALF)[:, None] + half
    p_a = codes + (at_m * (2 * HALF))[:, None] + half
    p_s = wscales + at_n
    acc = tl.zeros([BN, BM], tl.float32)
    scale = tl.load(p_s).to(tl.float32)
    for g in range(0, groups):
        b_w, b_even, b_odd = tl.load(p_w), tl.load(p_a), tl.load(p_a + HALF)
        ahead = tl.load(p_s + tl.minimum(g + 1, groups - 1)).to(tl.float32)
        part = tl.dot(b_w << 4, tl.trans(b_even), out_dtype=tl.int32)  # [BN, HALF] @ [HALF, BM] -> [BN, BM]
        part = tl.dot(b_w & -16, tl.trans(b_odd), part, out_dtype=tl.int32)
        acc += part.to(tl.float32) * scale[:, None]
        scale = ahead
        p_w += HALF
        p_a += 2 * HALF
    acc *= tl.load(token_scales + rows_m, mask=rows_m < m, other=0.0)[None, :] * 0.0625
    _finish(acc, y, down, lora_up, bias, rows_n, rows_m, m, n, rank, 1, HAS_BIAS, PRECISION, BN, BM)


@triton.jit
def _int4(nibble, kind: tl.constexpr):
    """0 ... 15 (uint8), two's complement -> -8 ... 7 in dtype `kind`, by the bits of a large float."""
    code = nibble ^ 8
    if kind == tl.bfloat16:
        return (code.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0  # 128 + code + 8
    elif kind == tl.float16:
        return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0  # 1024 + code + 8
    else:
        return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + code + 8


@triton.jit
def _e2m1(nibble, scale, kind: tl.constexpr):
    """code * scale in dtype `kind`; `scale` as by `_e4m3`. The code's bits are a float16's, 2^14 smaller."""
    code = nibble.to(tl.uint16)
    value = (((code & 7) << 9) | ((code & 8) << 12)).to(tl.float16, bitcast=True).to(tl.float32)
    return (value * scale).to(kind)


@triton.jit
def _e4m3(byte):
    """2^14 times the value, float32. The byte's bits are a float16's, 2^8 smaller: sm_80 has no e4m3 of its own."""
    bits = byte.to(tl.uint16)
    return (((bits & 127) << 7) | ((bits & 128) << 8)).to(tl.float16, bitcast=True).to(tl.float32) * 4194304.0


@triton.jit(do_not_specialize=SIZES)
def w4a16_kernel(z, token_scales, down, qweight, wscales, wtscale, lora_up, bias, y, m, n, steps, row_bytes, row_scales,
                 tensor_stride, rank, parts, tiles_m, tiles_n, NVFP4: tl.constexpr, SCALED: tl.constexpr,
                 HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, PLANES: tl.constexpr, HALF: tl.constexpr,
                 BN: tl.constexpr, BM: tl.constexpr):
    """z [m, steps, PLANES, 2, HALF]; a step is a group of int4, or 4 of nvfp4. SCALED: a float32 scale a token."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tiles_m, tiles_n)
    rows_n, rows_m = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    kind: tl.constexpr = z.dtype.element_ty
    half = tl.arange(0, HALF)
    at_n = tl.minimum(rows_n, n - 1).to(tl.int64)
    p_w = qweight + (at_n * row_bytes)[:, None] + half[None, :]
    p_z = z + (tl.minimum(rows_m, m - 1).to(tl.int64) * steps * (2 * HALF * PLANES))[:, None] + half[None, :]
    p_s = wscales + at_n * row_scales
    acc = tl.zeros([BN, BM], tl.float32)
    if NVFP4:
        quarter = tl.arange(0, HALF // 8)
        for t in range(0, steps):
            b_w = tl.load(p_w, mask=(t * HALF + half < row_bytes)[None, :], other=0)
            first = t * (HALF // 8)
            b_s = _e4m3(tl.load(p_s[:, None] + (first + quarter)[None, :],
                                mask=(first + quarter < row_scales)[None, :], other=0))
            b_s = tl.reshape(tl.broadcast_to(b_s[:, :, None], [BN, HALF // 8, 8]), [BN, HALF])
            w_even, w_odd = _e2m1(b_w & 15, b_s, kind), _e2m1(b_w >> 4, b_s, kind)
            for plane in tl.static_range(PLANES):
                b_even, b_odd = tl.load(p_z + plane * 2 * HALF), tl.load(p_z + plane * 2 * HALF + HALF)
                acc = tl.dot(w_even, tl.trans(b_even), acc, input_precision="tf32")  # [BN, HALF] @ [HALF, BM]
                acc = tl.dot(w_odd, tl.trans(b_odd), acc, input_precision="tf32")
            p_w += HALF
            p_z += 2 * HALF * PLANES
        acc *= tl.load(wtscale + at_n * tensor_stride).to(tl.float32)[:, None]
    else:
        scale = tl.load(p_s).to(tl.float32)
        for t in range(0, steps):
            b_w, b_even, b_odd = tl.load(p_w), tl.load(p_z), tl.load(p_z + HALF)
            ahead = tl.load(p_s + tl.minimum(t + 1, steps - 1)).to(tl.float32)
            w_even, w_odd = _int4(b_w & 15, kind), _int4(b_w >> 4, kind)
            part = tl.dot(w_even, tl.trans(b_even), input_precision="tf32")  # [BN, HALF] @ [HALF, BM] -> [BN, BM]
            part = tl.dot(w_odd, tl.trans(b_odd), part, input_precision="tf32")
            if PLANES == 2:
                b_even, b_odd = tl.load(p_z + 2 * HALF), tl.load(p_z + 3 * HALF)
                part = tl.dot(w_even, tl.trans(b_even), part, input_precision="tf32")
                part = tl.dot(w_odd, tl.trans(b_odd), part, input_precision="tf32")
            acc += part * scale[:, None]
            scale = ahead
            p_w += HALF
            p_z += 2 * HALF * PLANES
    if SCALED:
        acc *= tl.load(token_scales + rows_m, mask=rows_m < m, other=0.0)[None, :]
    _finish(acc, y, down, lora_up, bias, rows_n, rows_m, m, n, rank, parts, HAS_BIAS, PRECISION, BN, BM)


def _grid(m: int, n: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(m, tile.rows), triton.cdiv(n, tile.cols)


def up_precision(dtype: torch.dtype) -> str:
    """Of float32 products that end in `dtype`: one tensor-core pass keeps 10 bits, three nearly all."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def multiply_int8(codes: Tensor, token_scales: Tensor, down: Tensor, qweight: Tensor, wscales: Tensor, lora_up: Tensor,
                  bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [m, n] in `dtype`. codes int8 [m, K'] and down [1, m, r] as by `svdq_prepare.quantize`; int4 weights."""
    m, n, groups = codes.shape[0], qweight.shape[0], wscales.shape[1]
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    tile = svdq_gemm_tile(codes.device, m, torch.int8)
    tiles = _grid(m, n, tile)
    w4a8_kernel[(tiles[0] * tiles[1],)](
        codes, token_scales, down, qweight.view(torch.int8), wscales, lora_up, y if bias is None else bias, y, m, n,
        groups, lora_up.shape[1], *tiles, HAS_BIAS=bias is not None, PRECISION=up_precision(dtype),
        HALF=qweight.shape[1] // groups, BN=tile.cols, BM=tile.rows, **tile.options)
    return y


def multiply_float(z: Tensor, token_scales: Tensor | None, down: Tensor, qweight: Tensor, wscales: Tensor,
                   wtscale: Tensor | None, lora_up: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [m, n] in `dtype`. z [m, steps, planes, 2, half] and down [parts, m, r] as by `svdq_prepare`."""
    m, steps, planes, _, half = z.shape
    n = qweight.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=z.device)
    if y.numel() == 0:
        return y
    nvfp4 = wtscale is not None
    tile = svdq_gemm_tile(z.device, m, z.dtype)
    tiles = _grid(m, n, tile)
    w4a16_kernel[(tiles[0] * tiles[1],)](
        z, down if token_scales is None else token_scales, down, qweight,
        wscales.view(torch.uint8) if nvfp4 else wscales, wtscale if nvfp4 else wscales, lora_up,
        y if bias is None else bias, y, m, n, steps, qweight.shape[1], wscales.shape[1],
        int(nvfp4 and wtscale.numel() > 1), lora_up.shape[1], down.shape[0], *tiles, NVFP4=nvfp4,
        SCALED=token_scales is not None, HAS_BIAS=bias is not None,
        PRECISION=up_precision(dtype), PLANES=planes, HALF=half, BN=tile.cols, BM=tile.rows, **tile.options)
    return y
