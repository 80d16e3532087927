"""What attention is compared with. A peer that does not run here is named absent, with the reason."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from timing import rotating
from torch.nn.functional import scaled_dot_product_attention as sdpa


def forward(inputs: list[tuple]):
    """Dense SDPA, and on a GPU each of its backends: (calls, absent)."""
    calls, absent = {"sdpa": rotating(sdpa, inputs)}, {}
    backends = ("flash", "cudnn", "efficient")
    if inputs[0][0].device.type != "cuda":
        return calls, {f"sdpa {name}": "a GPU's" for name in backends}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return call

    for name in backends:
        calls[f"sdpa {name}"] = rotating(through(SDPBackend[f"{name.upper()}_ATTENTION"]), inputs)
    return calls, absent


def flex(inputs: list[tuple], block_maps: list[torch.Tensor], block_q: int, block_k: int):
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
    return {"flex_attention, same block map": rotating(lambda q, k, v, mask: compiled(q, k, v, block_mask=mask),
                                                       prepared)}


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


def backward(inputs: list[tuple]):
    return {"sdpa": backward_of(sdpa, inputs, [])}


def missing(package: str, device: torch.device) -> str:
    """Why a package of Triton kernels does not run here; "" where it does."""
    if importlib.util.find_spec(package) is None:
        return "not importable"
    return "" if device.type == "cuda" else "needs a GPU"


def checkouts(inputs: list[tuple], keep: float) -> dict[str, tuple]:
    """thu-ml/SLA (on PYTHONPATH) and flash-linear-attention: name -> (call, why not)."""
    device, dim = inputs[0][0].device, inputs[0][0].shape[-1]
    found = {}
    why = missing("sparse_linear_attention", device)
    call = None
    if not why:
        package = importlib.import_module("sparse_linear_attention")
        module = package.SparseLinearAttention(dim, keep, BLKQ=128, BLKK=64).to(device)
        call = rotating(lambda q, k, v: module(q, k, v), inputs)
    found["thu-ml/SLA"] = call, why
    why, call = missing("fla", device), None
    if not why:
        linear = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
        heads_last = [tuple(t.transpose(1, 2).contiguous() for t in qkv) for qkv in inputs]
        call = rotating(lambda q, k, v: linear(q, k, v)[0], heads_last)
    found["flash-linear-attention (causal, the linear branch alone)"] = call, why
    return found


def vmoba_checkout(inputs: list[tuple], chunk: int, top_k: int) -> tuple:
    """KwaiVGI/VMoBA's moba_attn_varlen, its folder on PYTHONPATH: (call, why not)."""
    device = inputs[0][0].device
    if why := missing("vmoba", device):
        return None, why
    attention = importlib.import_module("vmoba").moba_attn_varlen
    packed = [tuple(t[0].transpose(0, 1).contiguous() for t in qkv) for qkv in inputs]  # [S, H, D]
    length = len(packed[0][0])
    bounds = torch.tensor([0, length], dtype=torch.int32, device=device)
    return rotating(lambda q, k, v: attention(q=q, k=k, v=v, cu_seqlens=bounds, max_seqlen=length,
                                              moba_chunk_size=chunk, moba_topk=top_k, select_mode="topk",
                                              threshold_type="query_head", simsum_threshold=0.0), packed), ""
