"""Sparse-linear attention forward and backward, routing alone, VMoBA."""

from __future__ import annotations

import math

import peers_attention as peers
import torch
from case import B16, F32, Calls, Case, drifting, dtype_name, set_up, thread_scaling
from timing import rotating

import triskele as tk

BLOCK_Q, BLOCK_K = 128, 64
CHUNKS = 16  # of VMoBA


def _kept(keep, length) -> int:
    """Keys that a query attends to."""
    return max(1, int(keep * math.ceil(length / BLOCK_K))) * BLOCK_K


def _routed(q, k, keep):
    return tk.ops.route_blocks(q, k, keep=keep, block_q=BLOCK_Q, block_k=BLOCK_K)


def sla_forward(dtype, batch, heads, length, dim, keep, scope="all", *, target=None, curves=(), label="", flex=False):
    """Routing, sparse and linear branch and projection, everything included."""

    def make(device):
        inputs = drifting(device, dtype, batch, heads, length, dim)
        weight = torch.randn(dim, dim, device=device, dtype=dtype) / dim**0.5
        bias = torch.randn(dim, device=device, dtype=dtype)

        def ours(q, k, v):
            return tk.ops.sparse_linear_attention(q, k, v, _routed(q, k, keep), block_q=BLOCK_Q, block_k=BLOCK_K,
                                                  scope=scope, proj_weight=weight, proj_bias=bias)

        found, absent = peers.forward(inputs, backends=target is not None)
        if flex:
            set_up(peers.FLEX, lambda: peers.flex(inputs, [_routed(q, k, keep) for q, k, _ in inputs], BLOCK_Q,
                                                  BLOCK_K), found, absent)
        others, why = peers.checkouts(inputs, keep)
        found, absent = found | others, absent | why
        tokens = batch * heads * length
        flops = tokens * (4 * _kept(keep, length) * dim + 6 * dim * dim)
        return Calls(rotating(ours, inputs), found, absent, flops, 4 * tokens * dim * dtype.itemsize, dtype_name(dtype))

    name = f"sla_forward {scope} {dtype_name(dtype)} B{batch} H{heads} L{length} D{dim} keep {keep:g}"
    return Case(name, "sla_forward", make, {"sdpa": target} if target else {}, dict(curves), label)


def sla_backward(dtype, batch, heads, length, dim, keep, *, target=None, curves=(), label=""):
    """The backward pass alone, projection's gradient included, against SDPA's."""

    def make(device):
        inputs = drifting(device, dtype, batch, heads, length, dim)
        weight = (torch.randn(dim, dim, device=device, dtype=dtype) / dim**0.5).requires_grad_()

        def attention(q, k, v):
            return tk.ops.sparse_linear_attention(q, k, v, _routed(q, k, keep), block_q=BLOCK_Q, block_k=BLOCK_K,
                                                  proj_weight=weight)

        tokens = batch * heads * length
        found, absent = peers.backward(inputs, backends=target is not None)
        return Calls(peers.backward_of(attention, inputs, [weight]), found, absent,
                     tokens * (10 * _kept(keep, length) * dim + 14 * dim * dim), 8 * tokens * dim * dtype.itemsize,
                     dtype_name(dtype))

    name = f"sla_backward {dtype_name(dtype)} B{batch} H{heads} L{length} D{dim} keep {keep:g}"
    return Case(name, "sla_backward", make, {"sdpa": target} if target else {}, dict(curves), label)


def routing(dtype, batch, heads, length, dim, keep, *, curves=()):
    """One read of Q and K; the floor is that read."""

    def make(device):
        inputs = [(q, k) for q, k, _ in drifting(device, dtype, batch, heads, length, dim)]
        tokens = batch * heads * length
        blocks = batch * heads * math.ceil(length / BLOCK_Q) * math.ceil(length / BLOCK_K)
        return Calls(rotating(lambda q, k: _routed(q, k, keep), inputs), peers.routing(inputs, keep, BLOCK_Q, BLOCK_K),
                     {}, 2 * tokens * dim + 2 * blocks * dim, 2 * tokens * dim * dtype.itemsize + blocks, "float32")

    name = f"sla_route {dtype_name(dtype)} B{batch} H{heads} L{length} D{dim} keep {keep:g}"
    return Case(name, "sla_route", make, {}, dict(curves))


def _vmoba(length, density):
    chunk, top_k = length // CHUNKS, max(1, round(density * CHUNKS))

    def attention(q, k, v):
        return tk.ops.vmoba_attention(q, k, v, chunk=chunk, select="topk", pool="query", top_k=top_k)

    return attention, chunk, top_k


def vmoba_forward(dtype, heads, length, dim, density, *, target=None, curves=(), label=""):
    """Selection and attention; `density`: share of the chunks that a query attends to, its own among them."""

    def make(device):
        inputs = drifting(device, dtype, 1, heads, length, dim)
        attention, chunk, top_k = _vmoba(length, density)
        found, absent = peers.forward(inputs, backends=target is not None)
        absent["flex_attention on VMoBA"] = "a block mask cannot express a selection by query"
        others, why = peers.vmoba_checkout(inputs, chunk, top_k)
        found, absent = found | others, absent | why
        tokens = heads * length
        return Calls(rotating(attention, inputs), found, absent, tokens * 4 * top_k * chunk * dim,
                     4 * tokens * dim * dtype.itemsize, dtype_name(dtype))

    name = f"vmoba_forward {dtype_name(dtype)} H{heads} L{length} D{dim} density {density:g}"
    return Case(name, "vmoba", make, {"sdpa": target} if target else {}, dict(curves), label)


def vmoba_backward(dtype, heads, length, dim, density, *, target=None, label=""):
    """The backward pass alone, against SDPA's."""

    def make(device):
        inputs = drifting(device, dtype, 1, heads, length, dim)
        attention, chunk, top_k = _vmoba(length, density)
        tokens = heads * length
        found, absent = peers.backward(inputs, backends=target is not None)
        return Calls(peers.backward_of(attention, inputs, []), found, absent,
                     tokens * 10 * top_k * chunk * dim, 8 * tokens * dim * dtype.itemsize, dtype_name(dtype))

    name = f"vmoba_backward {dtype_name(dtype)} H{heads} L{length} D{dim} density {density:g}"
    return Case(name, "vmoba", make, {"sdpa": target} if target else {}, {}, label)


def short() -> list[Case]:
    found = []
    for dtype in (F32, B16):
        of = dtype_name(dtype)
        axes = {f"length, {of}": 8192, f"keep, {of}": 10, **({"head_dim, float32": 64} if dtype is F32 else {})}
        found += [
            sla_forward(dtype, 1, 8, 8192, 64, 0.1, target=10.0, curves=axes, flex=True,
                        label=f"SLA forward, 8,192 tokens, keep 10 %, {of}"),
            sla_forward(dtype, 1, 8, 8192, 64, 1.0, target=1.0, curves={f"keep, {of}": 100},
                        label=f"SLA forward, keep 100 %, {of}"),
            sla_backward(dtype, 1, 8, 8192, 64, 0.1, target=6.0, curves={f"backward, length, {of}": 8192},
                         label=f"SLA backward, keep 10 %, {of}"),
            vmoba_forward(dtype, 8, 8192, 64, 0.25, target=3.0, curves={f"density, {of}": 25},
                          label=f"VMoBA forward, 25 % density, {of}"),
            vmoba_backward(dtype, 8, 8192, 64, 0.25),
            routing(dtype, 1, 8, 8192, 64, 0.1),
        ]
        found += [sla_forward(dtype, 1, 8, 8192, 64, 0.1, scope) for scope in ("complement", "marginal")]
    found += [thread_scaling(case) for case in (
        sla_forward(F32, 1, 8, 8192, 64, 0.1), sla_forward(B16, 1, 8, 8192, 64, 0.1),
        sla_backward(F32, 1, 8, 8192, 64, 0.1), vmoba_forward(F32, 8, 8192, 64, 0.25))]
    return found


def curves() -> list[Case]:
    found = []
    for dtype in (F32, B16):
        of = dtype_name(dtype)
        found += [sla_forward(dtype, 1, 8, length, 64, 0.1, curves={f"length, {of}": length}, flex=dtype is F32)
                  for length in (1024, 2048, 4096, 16384)]
        found += [sla_forward(dtype, 1, 8, 8192, 64, keep, curves={f"keep, {of}": round(100 * keep)},
                              flex=keep in (0.02, 0.5)) for keep in (0.02, 0.05, 0.2, 0.5)]
        found += [vmoba_forward(dtype, 8, 8192, 64, density, curves={f"density, {of}": 100 * density})
                  for density in (0.125, 0.5, 1.0)]
    found.append(sla_forward(F32, 1, 8, 32768, 64, 0.1, curves={"length, float32": 32768}))
    found.append(sla_forward(B16, 1, 8, 32768, 64, 0.1, curves={"length, bfloat16": 32768}))
    found += [sla_forward(F32, 1, 8, 8192, dim, 0.1, curves={"head_dim, float32": dim}) for dim in (32, 72, 96, 128)]
    found += [sla_backward(F32, 1, 8, length, 64, 0.1, curves={"backward, length, float32": length})
              for length in (2048, 4096)]
    return found
