"""What we are compared with. A peer that does not import here is named absent, with the reason."""

from __future__ import annotations

import math

import torch
from timing import rotating
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import scaled_dot_product_attention as sdpa


def attention(inputs: list[tuple], keep: float | None):
    """Dense SDPA, each of its GPU backends, and FlexAttention under a mask of the same density."""
    device = inputs[0][0].device
    calls, absent = {"sdpa": rotating(lambda q, k, v: sdpa(q, k, v), inputs)}, {}
    if device.type == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        for name, backend in (("sdpa flash", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
                              ("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION)):
            def call(q, k, v, backend=backend):
                with sdpa_kernel(backend):
                    return sdpa(q, k, v)

            calls[name] = rotating(call, inputs)
    if keep is not None and keep < 1:
        calls["flex, same density"] = _flex(inputs, keep)
    for package in ("fla", "sparse_linear_attention"):
        if not _imports(package):
            absent[package] = "not importable"
    return calls, absent


def _flex(inputs, keep):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q = inputs[0][0]
    heads, length = q.shape[1], q.shape[2]
    blocks_q, blocks_k = math.ceil(length / 128), math.ceil(length / 128)
    kept = max(1, int(keep * blocks_k))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(heads, blocks_q, blocks_k, generator=generator)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(kept, 2).indices, True).to(q.device)
    mask = create_block_mask(lambda b, h, i, j: chosen[h, i // 128, j // 128], None, heads, length, length,
                             device=q.device.type, BLOCK_SIZE=128)
    compiled = torch.compile(flex_attention)
    return rotating(lambda q, k, v: compiled(q, k, v, block_mask=mask), inputs)


def attention_backward(inputs: list[tuple]):
    graphs = []
    for q, k, v in inputs:
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = sdpa(*leaves)
        graphs.append((out, leaves, torch.randn_like(out)))
    return {"sdpa": rotating(lambda out, leaves, up: torch.autograd.grad(out, leaves, up, retain_graph=True), graphs)}


def linear(inputs: list[tuple], weight: torch.Tensor, bias: torch.Tensor):
    """torch's float32 and bfloat16 linear (oneDNN or cuBLAS), int8 through torch, torchao, gemlite."""
    calls, absent = {}, {}
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        w, b = weight.to(dtype), bias.to(dtype)
        own = [(x.to(dtype),) for (x,) in inputs]
        calls[name] = rotating(lambda x, w=w, b=b: torch_linear(x, w, b), own)
    if weight.device.type == "cpu":
        codes = [((x.float() / x.float().abs().amax(1, keepdim=True) * 127).round().to(torch.int8),) for (x,) in inputs]
        w8 = (weight / weight.abs().amax() * 127).round().to(torch.int8).t().contiguous()
        calls["torch int8 product alone"] = rotating(lambda x: torch._int_mm(x, w8), codes)
    for package in ("torchao", "gemlite", "nunchaku"):
        if not _imports(package):
            absent[package] = "not importable"
    return calls, absent


def _imports(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
