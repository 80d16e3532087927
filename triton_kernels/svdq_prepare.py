"""What the 4-bit linear does to its input before the product, for 16 tokens a program:

    z = (x + shift) (1 / smooth)          float32, 1 / smooth rounded first
    down = x lora_down^T                  float32, on the tensor cores, from the same loads of x

    quantize_kernel   a = max|z| of a token; codes = round_half_even(z (127 / a)), scale a / 127. x comes from memory
                      once; the second sweep over the program's 16 rows finds them in cache
    smooth_kernel     z itself: in bfloat16; or in the 10 bits that a tf32 product reads, rounded to nearest; or, where
                      x is float32, in two such planes that add up to it. A program takes 1024 columns, so that a few
                      tokens of a long row occupy more than one multiprocessor; `down` then has a summand for each part,
                      added in the product

Codes and z are stored as the packed weights fall apart: in each group of 64 (or more) columns the even ones, then the
odd ones; columns beyond K are zero. A token's values depend on nothing but the token.

The codes are those of triskele.quantize.formats bit for bit: every division is rounded to nearest, the product with
127 / a is rounded before it is rounded to an integer (so multiply and add must stay apart: FUSION), and the maximum is
taken over bits, where NaN and infinity come out on top.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.configs import SVDQ_PREPARE

PART = 1024
FUSION = {"enable_fp_fusion": False}
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no place for a fraction
INFINITE, TINY = tl.constexpr(0x7F800000), tl.constexpr(1e-30)


@triton.jit
def _smoothed(x, smooth, shift, rows, cols, live, k, row_stride):
    """(x, z) [BM, BK] at rows and cols; both zero outside."""
    inside = cols < k
    mask = live[:, None] & inside[None, :]
    b_x = tl.load(x + rows[:, None] * row_stride + cols[None, :], mask=mask, other=0.0)
    inverse = tl.div_rn(1.0, tl.load(smooth + cols, mask=inside, other=1.0).to(tl.float32))
    return b_x, tl.where(mask, (b_x.to(tl.float32) + shift) * inverse[None, :], 0.0)


@triton.jit
def _project(acc, b_x, lora_down, cols, k, rank, WIDE: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr):
    """acc [BM, R] += x lora_down^T over `cols`. WIDE: the factors' dtype is not that of x, or both are float32."""
    ranks = tl.arange(0, R)
    b_l = tl.load(lora_down + ranks[:, None] * k + cols[None, :], mask=(ranks < rank)[:, None] & (cols < k)[None, :],
                  other=0.0)
    if WIDE:
        b_x, b_l = b_x.to(tl.float32), b_l.to(tl.float32)
    return tl.dot(b_x, tl.trans(b_l), acc, input_precision=PRECISION)  # [BM, BK] @ [BK, R] -> [BM, R]


@triton.jit
def _store_halves(out, value, rows, live, first, padded, PLANE: tl.constexpr, PLANES: tl.constexpr,
                  HALF: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """value [BM, BK] at columns from `first` on -> a plane of out [m, groups, planes, 2, HALF]: the even columns of a
    group, then the odd."""
    even, odd = tl.split(tl.reshape(value, [BM, BK // 2, 2]))
    pair = first // 2 + tl.arange(0, BK // 2)
    at = pair // HALF * (2 * HALF * PLANES) + PLANE * 2 * HALF + pair % HALF
    mask = live[:, None] & (pair < padded // 2)[None, :]
    place = out + rows[:, None] * (padded * PLANES) + at[None, :]
    tl.store(place, even.to(out.dtype.element_ty), mask=mask)
    tl.store(place + HALF, odd.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_down(down, acc, rows, live, rank, R: tl.constexpr):
    ranks = tl.arange(0, R)[None, :]
    tl.store(down + rows[:, None] * rank + ranks, acc, mask=live[:, None] & (ranks < rank))


@triton.jit(do_not_specialize=["m", "rank", "shift"])
def quantize_kernel(x, smooth, lora_down, codes, scales, down, m, k, padded, row_stride, rank, shift,
                    LOW: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
                    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < m
    top = tl.zeros([BM], tl.int32)
    acc = tl.zeros([BM, R], tl.float32)
    for first in range(0, k, BK):
        cols = first + tl.arange(0, BK)
        b_x, z = _smoothed(x, smooth, shift, rows, cols, live, k, row_stride)
        top = tl.maximum(top, tl.max(z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
        if LOW:
            acc = _project(acc, b_x, lora_down, cols, k, rank, WIDE, PRECISION, R)
    if LOW:
        _store_down(down, acc, rows, live, rank, R)

    amax = top.to(tl.float32, bitcast=True)
    finite = top < INFINITE
    dead = (amax < TINY) | (top >= INFINITE)
    safe = tl.where(dead, 1.0, amax)
    scale = tl.where(dead, 0.0, tl.div_rn(safe, 127.0))
    tl.store(scales + rows, tl.where(finite, scale, float("nan")), mask=live)
    factor = tl.where(dead, 0.0, tl.div_rn(127.0, safe))
    for first in range(0, padded, BK):
        cols = first + tl.arange(0, BK)
        _, z = _smoothed(x, smooth, shift, rows, cols, live, k, row_stride)
        z = tl.where(dead[:, None], 0.0, z) * factor[:, None]
        _store_halves(codes, ((z + ROUNDER) - ROUNDER).to(tl.int8), rows, live, first, padded, 0, 1, HALF, BM, BK)


@triton.jit
def _to_tf32(z):
    """The nearest number of 10 bits (ties away from zero): what a product would cut off is zero."""
    near = ((z.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(z == z, near, z)  # (a NaN's bits may run over)


@triton.jit(do_not_specialize=["m", "rank", "shift"])
def smooth_kernel(x, smooth, lora_down, out, down, m, k, padded, row_stride, rank, shift, LOW: tl.constexpr,
                  WIDE: tl.constexpr, PRECISION: tl.constexpr, PLANES: tl.constexpr, HALF: tl.constexpr,
                  R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < m
    part = tl.program_id(1)
    acc = tl.zeros([BM, R], tl.float32)
    for first in range(part * PART, tl.minimum(part * PART + PART, padded), BK):
        cols = first + tl.arange(0, BK)
        b_x, z = _smoothed(x, smooth, shift, rows, cols, live, k, row_stride)
        if LOW:
            acc = _project(acc, b_x, lora_down, cols, k, rank, WIDE, PRECISION, R)
        if out.dtype.element_ty == tl.float32:
            near = _to_tf32(z)
            _store_halves(out, near, rows, live, first, padded, 0, PLANES, HALF, BM, BK)
            if PLANES == 2:
                _store_halves(out, _to_tf32(z - near), rows, live, first, padded, 1, PLANES, HALF, BM, BK)
        else:
            _store_halves(out, z, rows, live, first, padded, 0, PLANES, HALF, BM, BK)
    if LOW:
        _store_down(down + part.to(tl.int64) * m * rank, acc, rows, live, rank, R)


def _options(x: Tensor, lora_down: Tensor) -> dict:
    wide = x.dtype != lora_down.dtype or x.dtype == torch.float32
    rank = max(16, triton.next_power_of_2(lora_down.shape[0]))
    load = rank * (1 if not wide else 4 if x.dtype == torch.float32 else 2)
    tile = SVDQ_PREPARE[next(top for top in SVDQ_PREPARE if load <= top)]
    return dict(LOW=lora_down.shape[0] > 0, WIDE=wide, PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
                R=rank, BM=tile.rows, BK=tile.depth, **tile.options, **FUSION)


def quantize(x: Tensor, smooth: Tensor, lora_down: Tensor, shift: float, half: int,
             dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, K] with unit column stride -> codes [m, steps, 1, 2, half] in `dtype` (int8, or float16 that holds the same
    integers), scales float32 [m], down float32 [1, m, r]."""
    m, k = x.shape
    steps = triton.cdiv(k, 2 * half)
    codes = torch.empty(m, steps, 1, 2, half, dtype=dtype, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    down = torch.empty(1, m, lora_down.shape[0], dtype=torch.float32, device=x.device)
    options = _options(x, lora_down)
    if m > 0:
        quantize_kernel[(triton.cdiv(m, options["BM"]),)](
            x, smooth, lora_down, codes, scales, down, m, k, steps * 2 * half, x.stride(0), lora_down.shape[0], shift,
            HALF=half, **options)
    return codes, scales, down


def smooth(x: Tensor, smooth: Tensor, lora_down: Tensor, shift: float, half: int) -> tuple[Tensor, Tensor]:
    """x [m, K] -> z [m, steps, planes, 2, half], bfloat16 where x is, else float32; down float32 [parts, m, r]."""
    m, k = x.shape
    steps = triton.cdiv(k, 2 * half)
    parts = triton.cdiv(steps * 2 * half, PART)
    planes = 2 if x.dtype == torch.float32 else 1
    z = torch.empty(m, steps, planes, 2, half, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32,
                    device=x.device)
    down = torch.empty(parts, m, lora_down.shape[0], dtype=torch.float32, device=x.device)
    options = _options(x, lora_down)
    if m > 0:
        smooth_kernel[(triton.cdiv(m, options["BM"]), parts)](
            x, smooth, lora_down, z, down, m, k, steps * 2 * half, x.stride(0), lora_down.shape[0], shift,
            PLANES=planes, HALF=half, PART=PART, **options)
    return z, down
