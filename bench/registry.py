"""The cases: an op on one shape, our call, the peers' calls, and the two numbers that bound it (operations, bytes)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import peers
import torch
from timing import rotating

import triskele as tk

SETS = 3  # of inputs, rotated


@dataclass
class Case:
    """make(device) -> Calls; `group` is what `run.py --only` takes; targets: peer -> ratio that we aim at."""

    name: str
    group: str
    make: Callable[[torch.device], Calls]
    targets: dict[str, float] = field(default_factory=dict)


@dataclass
class Calls:
    """`ours` against `peers`; absent: peer -> why it does not run here. flops and bytes of our algorithm, once."""

    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    absent: dict[str, str]
    flops: float
    bytes: float
    dtype: torch.dtype


def _qkv(device, dtype, batch, heads, length, dim):
    generator = torch.Generator().manual_seed(0)

    def tensor():
        # Tokens that drift along the sequence: blocks differ in their means, as in a trained model.
        drift = torch.randn(batch, heads, math.ceil(length / 64), dim, generator=generator).repeat_interleave(64, 2)
        noise = torch.randn(batch, heads, length, dim, generator=generator)
        return (noise + drift[:, :, :length]).to(device, dtype)

    return [(tensor(), tensor(), tensor()) for _ in range(SETS)]


def sla_forward(dtype, batch, heads, length, dim, keep, scope="all"):
    """Routing, sparse and linear branch and projection, everything included."""

    def make(device):
        inputs = _qkv(device, dtype, batch, heads, length, dim)
        weight = torch.randn(dim, dim, device=device, dtype=dtype) / dim**0.5
        bias = torch.randn(dim, device=device, dtype=dtype)

        def ours(q, k, v):
            m = tk.ops.route_blocks(q, k, keep=keep, block_q=128, block_k=64)
            return tk.ops.sparse_linear_attention(q, k, v, m, block_q=128, block_k=64, scope=scope,
                                                  proj_weight=weight, proj_bias=bias)

        found, absent = peers.attention(inputs, keep)
        kept = max(1, int(keep * math.ceil(length / 64))) * 64
        tokens = batch * heads * length
        flops = tokens * (4 * kept * dim + 6 * dim * dim)
        return Calls(rotating(ours, inputs), found, absent, flops, 4 * tokens * dim * dtype.itemsize, dtype)

    name = f"sla_forward {scope} {str(dtype)[6:]} B{batch} H{heads} L{length} D{dim} keep {keep:g}"
    targets = {"sdpa": 10.0 if keep == 0.1 else 1.0 if keep == 1.0 else 0.0}
    return Case(name, "sla_forward", make, {k: v for k, v in targets.items() if v})


def sla_backward(dtype, batch, heads, length, dim, keep):
    """Forward and backward, less the forward: what training pays."""

    def make(device):
        inputs = _qkv(device, dtype, batch, heads, length, dim)
        weight = (torch.randn(dim, dim, device=device, dtype=dtype) / dim**0.5).requires_grad_()
        graphs = []
        for q, k, v in inputs:
            leaves = [t.requires_grad_() for t in (q, k, v)]
            m = tk.ops.route_blocks(q, k, keep=keep, block_q=128, block_k=64)
            out = tk.ops.sparse_linear_attention(*leaves, m, block_q=128, block_k=64, proj_weight=weight)
            graphs.append((out, [*leaves, weight], torch.randn_like(out)))

        def ours(out, leaves, upstream):
            return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        kept = max(1, int(keep * math.ceil(length / 64))) * 64
        tokens = batch * heads * length
        return Calls(rotating(ours, graphs), peers.attention_backward(inputs), {},
                     tokens * (10 * kept * dim + 14 * dim * dim), 8 * tokens * dim * dtype.itemsize, dtype)

    return Case(f"sla_backward {str(dtype)[6:]} B{batch} H{heads} L{length} D{dim} keep {keep:g}", "sla_backward", make,
                {"sdpa": 6.0})


def vmoba_forward(dtype, heads, length, dim, density):
    """Selection and attention; `density`: share of the chunks that a query attends to."""

    def make(device):
        inputs = _qkv(device, dtype, 1, heads, length, dim)
        chunks = 16
        chunk, top_k = length // chunks, max(1, round(density * chunks))

        def ours(q, k, v):
            return tk.ops.vmoba_attention(q, k, v, chunk=chunk, select="topk", pool="query", top_k=top_k)

        found, absent = peers.attention(inputs, None)
        tokens = heads * length
        return Calls(rotating(ours, inputs), found, absent, tokens * 4 * top_k * chunk * dim,
                     4 * tokens * dim * dtype.itemsize, dtype)

    return Case(f"vmoba_forward {str(dtype)[6:]} H{heads} L{length} D{dim} density {density:g}", "vmoba_forward", make,
                {"sdpa": 3.0})


def svdq_linear(dtype, rows, inner, outer, rank=32):
    """Activation quantization, 4-bit product, low-rank branch and bias, everything included."""

    def make(device):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(outer, inner, generator=generator) / inner**0.5
        quantized = tk.quantize.svd_quantize(weight, rank=rank, iterations=1, svd="randomized")
        bias = torch.randn(outer, generator=generator).to(device, dtype)
        inputs = [(torch.randn(rows, inner, generator=generator).to(device, dtype),) for _ in range(SETS)]
        layer = tk.nn.SVDQuantLinear.from_quantized(quantized, bias).to(device)
        found, absent = peers.linear(inputs, weight.to(device), bias)
        flops = 2 * rows * inner * outer + 2 * rows * rank * (inner + outer)
        return Calls(rotating(lambda x: layer(x), inputs), found, absent, flops,
                     inner * outer / 2 + rows * (inner + outer) * dtype.itemsize, dtype)

    targets = {"torch bfloat16": 1.3, "torch float32": 4.0} if rows >= 1024 else {
        "torch bfloat16": 1.0, "torch float32": 1.0}
    return Case(f"svdq_linear {str(dtype)[6:]} M{rows} K{inner} N{outer} r{rank}", "svdq_linear", make, targets)


def cases(which: str = "short") -> list[Case]:
    """"short": the shapes with targets. "curves": over L, keep, head_dim and M."""
    f32, b16 = torch.float32, torch.bfloat16
    short = [sla_forward(t, 1, 8, 8192, 64, keep) for t in (f32, b16) for keep in (0.1, 1.0)]
    short += [sla_forward(f32, 1, 8, 8192, 64, 0.1, "complement"), sla_backward(f32, 1, 8, 8192, 64, 0.1),
              sla_backward(b16, 1, 8, 8192, 64, 0.1), vmoba_forward(f32, 8, 8192, 64, 0.25),
              vmoba_forward(b16, 8, 8192, 64, 0.25)]
    short += [svdq_linear(b16, rows, 3072, 3072) for rows in (1, 16, 1024)]
    if which == "short":
        return short
    curves = [sla_forward(f32, 1, 8, length, 64, 0.1) for length in (1024, 2048, 4096, 16384, 32768)]
    curves += [sla_forward(f32, 1, 8, 8192, 64, keep) for keep in (0.02, 0.05, 0.2, 0.5)]
    curves += [sla_forward(f32, 1, 4, 8192, dim, 0.1) for dim in (32, 72, 96, 128)]
    curves += [svdq_linear(b16, rows, 3072, 3072) for rows in (4, 64, 256, 4096)]
    return short + curves
