"""The SVDQuant W4A8 linear, over M and over the shapes of a FLUX block; with integer scales; with GELU behind it."""

from __future__ import annotations

import functools

import peers_linear as peers
import torch
from case import B16, F32, SETS, Calls, Case, dtype_name, thread_scaling
from timing import rotating
from torch.nn.functional import gelu

import triskele as tk


@functools.lru_cache(maxsize=1)
def _quantized(inner: int, outer: int, rank: int, scales: str):
    """(weight [N, K], the same in 4 bits, bias): the speed does not depend on how well it was calibrated."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outer, inner, generator=generator) / inner**0.5
    how = {} if scales == "amax" else {"scales": scales}  # commits that bench/compare.py measures know no others
    quantized = tk.quantize.svd_quantize(weight, rank=rank, iterations=1, svd="randomized", dtype=B16, **how)
    return weight, quantized, torch.randn(outer, generator=generator)


def svdq_linear(dtype, rows, inner, outer, rank=32, scales="amax", *, activated=False, targets=None, curves=(),
                label=""):
    """Activation quantization, 4-bit product, low-rank branch and bias, everything included.

    activated  GELU (tanh) as the linear's epilogue, behind every peer, and behind our linear as a peer of its own
    """

    def make(device):
        weight, quantized, bias = _quantized(inner, outer, rank, scales)
        bias = bias.to(device, dtype)
        generator = torch.Generator().manual_seed(1)
        inputs = [(torch.randn(rows, inner, generator=generator).to(device, dtype),) for _ in range(SETS)]
        layer = tk.nn.SVDQuantLinear.from_quantized(quantized, bias).to(device)
        found, absent = peers.linear(inputs, weight.to(device), bias)
        run = torch.no_grad()(lambda x: layer(x))
        if activated:
            found["W4A8, then GELU"] = rotating(run, inputs)
            found = {name: _then_gelu(call) for name, call in found.items()}
            run = torch.no_grad()(lambda x: layer(x, epilogue="gelu_tanh"))
        flops = 2 * rows * inner * outer + 2 * rows * rank * (inner + outer)
        return Calls(rotating(run, inputs), found, absent, flops,
                     inner * outer / 2 + rows * (inner + outer) * dtype.itemsize, "int8")

    name = f"svdq_linear{'_gelu' * activated} {dtype_name(dtype)} M{rows} K{inner} N{outer} r{rank}"
    name += " integer scales" if scales == "integer" else ""
    return Case(name, "svdq_linear", make, targets or {}, dict(curves), label)


def _then_gelu(call):
    def activated():
        return gelu(call(), approximate="tanh")

    activated.sets = call.sets
    return activated


FEW = {"torch bfloat16": 1.0, "torch float32": 1.0}
MANY = {"torch bfloat16": 1.3, "torch float32": 4.0}


def short() -> list[Case]:
    found = [svdq_linear(B16, rows, 3072, 3072, targets=MANY if rows >= 1024 else FEW, curves={"M": rows},
                         label=f"W4A8 linear, 3072 → 3072, M = {rows:,}") for rows in (1, 16, 1024)]
    found += [svdq_linear(B16, rows, 3072, 3072, scales="integer", targets=MANY if rows >= 1024 else FEW,
                          curves={"M, integer scales": rows},
                          label=f"W4A8 linear, integer scales, 3072 → 3072, M = {rows:,}") for rows in (1, 16, 1024)]
    found += [svdq_linear(F32, 1024, 3072, 3072, targets=MANY),
              thread_scaling(svdq_linear(B16, 1024, 3072, 3072))]
    found += [svdq_linear(B16, rows, inner, outer, targets=MANY if rows >= 1024 else FEW)
              for inner, outer in ((3072, 12288), (12288, 3072)) for rows in (16, 1024)]
    found += [svdq_linear(B16, 1024, inner, outer, scales="integer", targets=MANY)
              for inner, outer in ((3072, 12288), (12288, 3072))]
    found += [svdq_linear(B16, 1024, 3072, 12288, scales=scales, activated=True, targets=MANY)
              for scales in ("amax", "integer")]
    return found


def curves() -> list[Case]:
    return [svdq_linear(B16, rows, 3072, 3072, scales=scales, curves={axis: rows})
            for scales, axis in (("amax", "M"), ("integer", "M, integer scales")) for rows in (4, 64, 256, 4096)]
