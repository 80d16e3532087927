"""The SVDQuant W4A8 linear, over M and over the shapes of a FLUX block."""

from __future__ import annotations

import functools

import peers_linear as peers
import torch
from case import B16, F32, SETS, Calls, Case, dtype_name, thread_scaling
from timing import rotating

import triskele as tk


@functools.lru_cache(maxsize=1)
def _quantized(inner: int, outer: int, rank: int):
    """(weight [N, K], the same in 4 bits, bias): the speed does not depend on how well it was calibrated."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outer, inner, generator=generator) / inner**0.5
    quantized = tk.quantize.svd_quantize(weight, rank=rank, iterations=1, svd="randomized")
    return weight, quantized, torch.randn(outer, generator=generator)


def svdq_linear(dtype, rows, inner, outer, rank=32, *, targets=None, curves=(), label=""):
    """Activation quantization, 4-bit product, low-rank branch and bias, everything included."""

    def make(device):
        weight, quantized, bias = _quantized(inner, outer, rank)
        bias = bias.to(device, dtype)
        generator = torch.Generator().manual_seed(1)
        inputs = [(torch.randn(rows, inner, generator=generator).to(device, dtype),) for _ in range(SETS)]
        layer = tk.nn.SVDQuantLinear.from_quantized(quantized, bias).to(device)
        found, absent = peers.linear(inputs, weight.to(device), bias)
        flops = 2 * rows * inner * outer + 2 * rows * rank * (inner + outer)
        return Calls(rotating(torch.no_grad()(lambda x: layer(x)), inputs), found, absent, flops,
                     inner * outer / 2 + rows * (inner + outer) * dtype.itemsize, "int8")

    name = f"svdq_linear {dtype_name(dtype)} M{rows} K{inner} N{outer} r{rank}"
    return Case(name, "svdq_linear", make, targets or {}, dict(curves), label)


FEW = {"torch bfloat16": 1.0, "torch float32": 1.0}
MANY = {"torch bfloat16": 1.3, "torch float32": 4.0}


def short() -> list[Case]:
    found = [svdq_linear(B16, rows, 3072, 3072, targets=MANY if rows >= 1024 else FEW, curves={"M": rows},
                         label=f"W4A8 linear, 3072 → 3072, M = {rows:,}") for rows in (1, 16, 1024)]
    found += [svdq_linear(F32, 1024, 3072, 3072, targets=MANY),
              thread_scaling(svdq_linear(B16, 1024, 3072, 3072))]
    found += [svdq_linear(B16, rows, inner, outer, targets=MANY if rows >= 1024 else FEW)
              for inner, outer in ((3072, 12288), (12288, 3072)) for rows in (16, 1024)]
    return found


def curves() -> list[Case]:
    return [svdq_linear(B16, rows, 3072, 3072, curves={"M": rows}) for rows in (4, 64, 256, 4096)]
