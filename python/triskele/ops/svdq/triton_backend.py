"""The Triton entries of the 4-bit linear's tables: what they refuse, and the way to their launchers.

Triton is imported at the first call, not with the package: it is large, and most machines of this package have no use
for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triskele.ops.svdq.reference import activated

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = (64, 128)  # of int4: half of one is the depth of a product, and at least an instruction's
RANK = 256  # the projection down holds them all in registers


def why_not(x: Tensor, qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, lora_down: Tensor, lora_up: Tensor,
            smooth: Tensor, bias: Tensor | None, format: str, *_rest) -> list[str]:
    reasons = []
    if x.dtype not in DTYPES:
        reasons.append(f"takes float16, bfloat16 and float32, got {x.dtype}")
    group = qweight.shape[1] * 2 // wscales.shape[1]
    if format == "int4" and group not in GROUPS:
        reasons.append(f"takes int4 groups of 64 and 128, got {group}")
    if format == "nvfp4" and wscales.dtype != torch.float8_e4m3fn:
        reasons.append(f"takes nvfp4 scales in float8_e4m3fn, got {wscales.dtype}")
    if lora_down.shape[0] > RANK:
        reasons.append(f"takes ranks up to {RANK}, got {lora_down.shape[0]}")
    return reasons


def _prepared(x, qweight, wscales, lora_down, lora_up, bias, format):
    """(x with unit column stride, the other tensors contiguous, half a group's columns)."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    half = 32 if format == "nvfp4" else qweight.shape[1] // wscales.shape[1]
    tensors = (None if t is None else t.contiguous() for t in (qweight, wscales, lora_down, lora_up, bias))
    return x, *tensors, half


def w4a8(x, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format, _activation, shift,
         epilogue="none") -> Tensor:
    """Two kernels: quantize and project down; multiply, scale, project up, add the bias. GELU is not fused here."""
    from triskele.triton_kernels import svdq_gemm, svdq_prepare

    x, qweight, wscales, lora_down, lora_up, bias, half = _prepared(x, qweight, wscales, lora_down, lora_up, bias,
                                                                    format)
    nvfp4 = format == "nvfp4"
    with torch.cuda.device_of(x):
        codes, scales, down = svdq_prepare.quantize(x, smooth.contiguous(), lora_down, shift, half,
                                                    torch.float16 if nvfp4 else torch.int8)
        if nvfp4:
            y = svdq_gemm.multiply_float(codes, scales, down, qweight, wscales, wtscale, lora_up, bias, x.dtype)
        else:
            y = svdq_gemm.multiply_int8(codes, scales, down, qweight, wscales, lora_up, bias, x.dtype)
        return activated(y, epilogue)


def w4a16(x, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format, _activation, shift,
          epilogue="none") -> Tensor:
    """Two kernels: smooth and project down; multiply, scale, project up, add the bias. GELU is not fused here."""
    from triskele.triton_kernels import svdq_gemm, svdq_prepare

    x, qweight, wscales, lora_down, lora_up, bias, half = _prepared(x, qweight, wscales, lora_down, lora_up, bias,
                                                                    format)
    with torch.cuda.device_of(x):
        z, down = svdq_prepare.smooth(x, smooth.contiguous(), lora_down, shift, half)
        y = svdq_gemm.multiply_float(z, None, down, qweight, wscales, wtscale, lora_up, bias, x.dtype)
        return activated(y, epilogue)
