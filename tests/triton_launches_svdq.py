"""The launches of the 4-bit linear's kernels that are held to compile: see triton_offline.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from triton_offline import HALF, Case

from triskele.triton_kernels import svdq_gemm, svdq_prepare

INTEGER = {80: ("IMMA",), 89: ("IMMA",), 90: ("IGMMA",), 100: ("UTCIMMA",), 120: ("IMMA",)}
"""The matrix instruction of int8 products, by chip."""


def _case(chip: int, m: int, dtype: torch.dtype, format: str, activation: str, rank: int = 32, group: int = 64,
          factors: torch.dtype = torch.bfloat16, k: int = 3072, n: int = 1000) -> Case:
    nvfp4 = format == "nvfp4"
    half = 32 if nvfp4 else group // 2

    def empty(*shape, dtype=factors):
        return torch.empty(shape, dtype=dtype, device="meta")
    x, smooth, lora_down, lora_up, bias = (empty(m, k, dtype=dtype), empty(k), empty(rank, k), empty(n, rank), empty(n))
    width = -(-k // (16 if nvfp4 else group)) * (16 if nvfp4 else group)
    qweight = empty(n, width // 2, dtype=torch.uint8)
    wscales = empty(n, width // (16 if nvfp4 else group), dtype=torch.float8_e4m3fn if nvfp4 else factors)
    wtscale = empty(1, dtype=torch.float32) if nvfp4 else None
    kernel, matrix = ("w4a8_kernel", INTEGER) if activation == "int8" and not nvfp4 else ("w4a16_kernel", HALF)

    def call():
        if activation == "none":
            z, down = svdq_prepare.smooth(x, smooth, lora_down, 0.0, half)
            svdq_gemm.multiply_float(z, None, down, qweight, wscales, wtscale, lora_up, bias, dtype)
            return
        codes, scales, down = svdq_prepare.quantize(x, smooth, lora_down, 0.0, half,
                                                    torch.float16 if nvfp4 else torch.int8)
        if nvfp4:
            svdq_gemm.multiply_float(codes, scales, down, qweight, wscales, wtscale, lora_up, bias, dtype)
        else:
            svdq_gemm.multiply_int8(codes, scales, down, qweight, wscales, lora_up, bias, dtype)
    name = f"svdq {str(dtype).removeprefix('torch.')} M={m} K={k} {format} {activation} r={rank} group={group}"
    name += " wide factors" * (factors == torch.float32)
    return Case(name, call, {kernel: matrix[chip]})


def cases(chip: int, full: bool) -> Iterator[Case]:
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    if full:
        for m, dtype, format, activation in product((4608, 64, 3), (bfloat16, float16, float32), ("int4", "nvfp4"),
                                                    ("int8", "none")):
            yield _case(chip, m, dtype, format, activation)
        for dtype, activation in product((bfloat16, float32), ("int8", "none")):
            yield _case(chip, 4608, dtype, "int4", activation, group=128)
            yield _case(chip, 4608, dtype, "nvfp4", activation, k=200)
            for rank in (0, 128, 256):
                yield _case(chip, 500, dtype, "int4", activation, rank)
                yield _case(chip, 500, dtype, "int4", activation, rank, factors=float32)
        return
    # both products with integers on every chip; formats and dtypes shift from chip to chip
    at = (80, 89, 90, 100, 120).index(chip)
    yield _case(chip, 4608, (bfloat16, float16, bfloat16, float32, bfloat16)[at], "int4", "int8")
    yield _case(chip, 64 if at % 2 else 3, bfloat16 if at % 2 == 0 else float32, "nvfp4" if at == 2 else "int4", "none")


def targets(chip: int) -> Iterator[Case]:
    """A FLUX.1 projection, many tokens and three."""
    yield _case(chip, 4608, torch.bfloat16, "int4", "int8", n=3072)
    yield _case(chip, 3, torch.bfloat16, "int4", "none", n=3072)
