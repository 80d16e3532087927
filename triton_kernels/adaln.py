"""What surrounds the matrix products of a block, each in one pass over the tokens:

    modulate_kernel   (LayerNorm(x) weight + bias) (1 + scale_r) + shift_r
    gate_kernel       residual + gate_r x                                           r = row_index[b]

A token is held in registers between its mean, its variance and its result, so it is read once; all arithmetic is
float32. A program of modulate_kernel makes the factor and the offset of its sample's row once, for several tokens; for
very wide tokens, beside which they find no room in registers, anew for each.
Contracts: python/triskele/ops/adaln/api.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.configs import ADALN_HELD, adaln_gate_tile, adaln_modulate_tile

SIZES = ["tokens", "blocks", "rows"]


@triton.jit
def _row(index, b, rows, INDEXED: tl.constexpr):
    """(the row of the modulation that sample b takes, what its factors gain: 0, or NaN where there is no such row)."""
    if INDEXED:
        r = tl.load(index + b)
        poison = tl.where((r < 0) | (r >= rows), float("nan"), 0.0)
        r = tl.where(poison == 0, r, 0)
    else:
        r = tl.where(rows == 1, 0, b)
        poison = 0.0
    return r, poison


@triton.jit
def _factors(scale, shift, weight, bias, cols, inside, poison, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """(factor, offset): (z w + β)(1 + s) + t = z (w (1 + s)) + (β (1 + s) + t)."""
    factor = 1.0 + poison + tl.load(scale + cols, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + cols, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        offset += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32) * factor
    if WEIGHT:
        factor *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    return factor, offset


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def modulate_kernel(x, scale, shift, index, weight, bias, out, x_b, x_l, scale_r, shift_r, tokens, channels, blocks,
                    rows, eps, INDEXED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr,
                    HELD: tl.constexpr, CP: tl.constexpr):
    """x[b, l, c] at x + b x_b + l x_l + c; out contiguous; CP: the channels, padded; HELD: the row's factors stay in
    registers."""
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    r, poison = _row(index, b, rows, INDEXED)
    cols = tl.arange(0, CP)
    inside = cols < channels
    scale += r * scale_r
    shift += r * shift_r
    if HELD:
        factor, offset = _factors(scale, shift, weight, bias, cols, inside, poison, WEIGHT, BIAS)
    for token in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, tokens)):
        b_x = tl.load(x + b * x_b + (b * 0 + token) * x_l + cols, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(b_x, 0) / channels
        centered = tl.where(inside, b_x - mean, 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 0) / channels + eps)
        if not HELD:
            factor, offset = _factors(scale, shift, weight, bias, cols, inside, poison, WEIGHT, BIAS)
        y = centered * inverse * factor + offset
        tl.store(out + (b * tokens + token) * channels + cols, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(residual, x, gate, index, out, residual_b, residual_l, x_b, x_l, gate_r, tokens, channels, blocks, rows,
                INDEXED: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr):
    """A program: TOKENS tokens of a sample, COLS channels. The result is rounded once."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    ls = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < channels
    mask = (ls < tokens)[:, None] & inside[None, :]
    r, poison = _row(index, b, rows, INDEXED)
    g = tl.load(gate + r * gate_r + cols, mask=inside, other=0.0).to(tl.float32) + poison
    at = ls.to(tl.int64)[:, None]
    kept = tl.load(residual + b * residual_b + at * residual_l + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    b_x = tl.load(x + b * x_b + at * x_l + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (b * tokens + at) * channels + cols[None, :], (kept + g[None, :] * b_x).to(out.dtype.element_ty),
             mask=mask)


def _unit_channels(value: Tensor) -> Tensor:
    """Any strides but the last: a chunk of a wider projection is read in place."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def modulate(x: Tensor, scale: Tensor, shift: Tensor, row_index: Tensor | None, weight: Tensor | None,
             bias: Tensor | None, eps: float) -> Tensor:
    """[B, L, C]; see `triskele.ops.adaln_modulate`."""
    batch, tokens, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x, scale, shift = _unit_channels(x), _unit_channels(scale), _unit_channels(shift)
    weight, bias, row_index = (None if v is None else v.contiguous() for v in (weight, bias, row_index))
    padded = triton.next_power_of_2(channels)
    tile = adaln_modulate_tile(padded)
    blocks = triton.cdiv(tokens, tile.rows)
    modulate_kernel[(batch * blocks,)](
        x, scale, shift, *(x if v is None else v for v in (row_index, weight, bias)), out, x.stride(0), x.stride(1),
        scale.stride(0), shift.stride(0), tokens, channels, blocks, len(scale), eps, INDEXED=row_index is not None,
        WEIGHT=weight is not None, BIAS=bias is not None, TOKENS=tile.rows, HELD=padded <= ADALN_HELD, CP=padded,
        **tile.options)
    return out


def gate(residual: Tensor, x: Tensor, gate: Tensor, row_index: Tensor | None) -> Tensor:
    """[B, L, C]; see `triskele.ops.gate_residual`."""
    batch, tokens, channels = x.shape
    out = residual.new_empty(residual.shape)
    if out.numel() == 0:
        return out
    residual, x, gate = _unit_channels(residual), _unit_channels(x), _unit_channels(gate)
    row_index = None if row_index is None else row_index.contiguous()
    tile = adaln_gate_tile(triton.next_power_of_2(channels))
    blocks = triton.cdiv(tokens, tile.rows)
    gate_kernel[(batch * blocks, triton.cdiv(channels, tile.cols))](
        residual, x, gate, x if row_index is None else row_index, out, residual.stride(0), residual.stride(1),
        x.stride(0), x.stride(1), gate.stride(0), tokens, channels, blocks, len(gate), INDEXED=row_index is not None,
        TOKENS=tile.rows, COLS=tile.cols, **tile.options)
    return out
