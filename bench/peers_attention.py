"""What attention is compared with. A peer that does not run here is named absent, with the reason.

Every function that sets up several peers returns (calls, absent).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from case import set_up
from timing import rotating
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

DENSE = {"cuda": ("flash", "cudnn", "efficient"), "cpu": ("flash", "math")}
"""SDPA's backends by device. A GPU's "math" is left out: it writes the scores, tens of gigabytes for a video."""
OF_THE_OTHER = {"cuda": {}, "cpu": {f"sdpa {name}": "a GPU's" for name in ("cudnn", "efficient")}}
FLEX = "flex_attention, same block map"
SLA = "thu-ml/SLA"
FLA = "flash-linear-attention (causal, the linear branch alone)"
SCORES = 3e9
"""Bytes of float32 scores up to which "math", which keeps two arrays of them, is timed."""


def through(name: str) -> Callable:
    """SDPA on one of its backends; AttributeError where this torch has none of that name."""
    backend = getattr(SDPBackend, "MATH" if name == "math" else f"{name.upper()}_ATTENTION")

    def call(q, k, v):
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return call


def dense(inputs: list[tuple], of: Callable[[Callable, list[tuple]], Callable], backends: bool) -> tuple[dict, dict]:
    """What `of` makes of SDPA as torch chooses it and, where `backends`, of each of its backends: (calls, absent)."""
    calls, absent = {}, {}
    q, k, _ = inputs[0]
    set_up("sdpa", lambda: of(sdpa, inputs), calls, absent)
    if not backends:
        return calls, absent
    for name in DENSE[q.device.type]:
        scores = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        if name == "math" and scores > SCORES:
            absent["sdpa math"] = "its scores do not fit"
            continue
        # One set of scores is larger than any cache: the math backend's backward needs to keep no more than that.
        kept = inputs[:1] if name == "math" else inputs
        set_up(f"sdpa {name}", lambda name=name, kept=kept: of(through(name), kept), calls, absent)
    return calls, absent | OF_THE_OTHER[q.device.type]


def forward(inputs: list[tuple], *, backends: bool = True) -> tuple[dict, dict]:
    """Dense SDPA, and each of its backends."""
    return dense(inputs, rotating, backends)


def flex(inputs: list[tuple], block_maps: list[torch.Tensor], block_q: int, block_k: int) -> Callable:
    """FlexAttention on the very blocks that ours keeps. It gets the map ready made, and has no linear branch."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    torch._dynamo.reset()  # it compiles once a shape, and gives up after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    prepared = []
    for (q, k, v), block_map in zip(inputs, block_maps):
        critical = block_map == 1
        counts = critical.sum(-1, dtype=torch.int32)
        order = critical.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        mask = BlockMask.from_kv_blocks(torch.zeros_like(counts), torch.zeros_like(order), counts, order,
                                        BLOCK_SIZE=(block_q, block_k), seq_lengths=(q.shape[2], k.shape[2]))
        prepared.append((q, k, v, mask))
    return rotating(lambda q, k, v, mask: compiled(q, k, v, block_mask=mask), prepared)


def routing(inputs: list[tuple], keep: float, block_q: int, block_k: int):
    """The same map in torch: means of blocks, their products, topk."""

    def pooled(x, block):
        return torch.nn.functional.avg_pool1d(x.flatten(0, 1).mT, block, ceil_mode=True).mT.float()

    def route(q, k):
        scores = pooled(q, block_q) @ pooled(k, block_k).mT
        chosen = scores.topk(max(1, int(keep * scores.shape[-1])), -1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.int8).scatter_(-1, chosen, 1)

    return {"torch: pool, topk": rotating(route, inputs)}


def backward_of(attention, inputs: list[tuple], parameters: list[torch.Tensor]):
    """Gradients of q, k, v and the parameters, from graphs that are kept."""
    graphs = []
    for q, k, v in inputs:
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        graphs.append((out, [*leaves, *parameters], torch.randn_like(out)))
    return rotating(lambda out, leaves, up: torch.autograd.grad(out, leaves, up, retain_graph=True), graphs)


def backward(inputs: list[tuple], *, backends: bool = True) -> tuple[dict, dict]:
    """The backward pass of dense SDPA, and of each of its backends: the forward's choice is the backward's too."""
    return dense(inputs, lambda attention, own: backward_of(attention, own, []), backends)


def missing(package: str, device: torch.device) -> str:
    """Why a package of GPU kernels does not run here; "" where it does."""
    if importlib.util.find_spec(package) is None:
        return "not importable"
    return "" if device.type == "cuda" else "needs a GPU"


def checkouts(inputs: list[tuple], keep: float) -> tuple[dict, dict]:
    """thu-ml/SLA (on PYTHONPATH) and flash-linear-attention: (calls, absent)."""
    device, dim = inputs[0][0].device, inputs[0][0].shape[-1]
    calls, absent = {}, {}

    def sla():
        package = importlib.import_module("sparse_linear_attention")
        module = package.SparseLinearAttention(dim, keep, BLKQ=128, BLKK=64).to(device).requires_grad_(False)
        return rotating(lambda q, k, v: module(q, k, v), inputs)

    def fla():
        linear = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
        heads_last = [tuple(t.transpose(1, 2).contiguous() for t in qkv) for qkv in inputs]
        return rotating(lambda q, k, v: linear(q, k, v)[0], heads_last)

    for name, package, make in ((SLA, "sparse_linear_attention", sla), (FLA, "fla", fla)):
        if why := missing(package, device):
            absent[name] = why
        else:
            set_up(name, make, calls, absent)
    return calls, absent


def vmoba_checkout(inputs: list[tuple], chunk: int, top_k: int) -> tuple[dict, dict]:
    """KwaiVGI/VMoBA's moba_attn_varlen, its folder on PYTHONPATH: (calls, absent)."""
    device = inputs[0][0].device
    if why := missing("vmoba", device):
        return {}, {"vmoba": why}

    def make():
        attention = importlib.import_module("vmoba").moba_attn_varlen
        packed = [tuple(t[0].transpose(0, 1).contiguous() for t in qkv) for qkv in inputs]  # [S, H, D]
        length = len(packed[0][0])
        bounds = torch.tensor([0, length], dtype=torch.int32, device=device)
        return rotating(lambda q, k, v: attention(q=q, k=k, v=v, cu_seqlens=bounds, max_seqlen=length,
                                                  moba_chunk_size=chunk, moba_topk=top_k, select_mode="topk",
                                                  threshold_type="query_head", simsum_threshold=0.0), packed)

    calls, absent = {}, {}
    set_up("vmoba", make, calls, absent)
    return calls, absent
