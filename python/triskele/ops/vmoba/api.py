"""VMoBA: each query attends to its own chunk of tokens and to the chunks whose mean key it matches best."""

from __future__ import annotations

import torch

from triskele.checks import check_choice, check_int, check_same, check_shape, check_tensor, expected
from triskele.ops.vmoba import op as _op
from triskele.ops.vmoba.partition import VMoBAPartition

MAX_HEAD_DIM = 256
POOLS = {"topk": ("query", "head", "all"), "threshold": ("query", "block", "head", "all")}


def vmoba_select(q, k, *, chunk, select: str = "topk", pool: str = "query", top_k: int | None = None,
                 threshold: float | None = None, backend: str = "auto") -> torch.Tensor:
    """g[c, h, s] = q_s . mean(K_c); mask[c, h, s] = c holds s, or c is among the best of the pool of (c, h, s).

    Args:
        q, k: [B, H, S, D], any floating dtype, tokens in the caller's order; 1 <= D <= 256.
        chunk: a chunk length (tokens as they come, the last chunk may be shorter; at least S: one chunk), or a
            `vmoba_partition` of S tokens on q's device. C chunks.
        select: "topk": `top_k` chunks a query, its own first among them, and the others with the largest gates:
            top_k - 1 for each (h, s) of pool "query", (top_k - 1) S for each head of pool "head", (top_k - 1) H S over
            all of pool "all".
            "threshold": n = (g - min) / (max - min) over the pool, T = sum n + 1e-6 (own chunks included); kept are the
            own chunks and the shortest non-empty run of others, best first, with
            sum n / T >= threshold - sum n[own] / T; all others where none reaches it.
        pool: what competes, always within one sample: "query" one (h, s); "block" one chunk's (h, s), threshold only;
            "head" one head's (c, s); "all" all (c, h, s).
        top_k: integer >= 1 (1: the own chunk alone), read by "topk". More than C: all chunks.
        threshold: in (0, 1], read by "threshold".
        backend: "auto", "triton", "cpu", "reference".

    Returns:
        bool [B, C, H, S]. Equal gates rank by chunk, head, token. Gates are summed in float64 and rounded to float32
        whatever the dtype of q and k, not scaled, and carry no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device, chunk, pool, top_k or threshold.
        NotImplementedError: the backend asked for does not take these inputs.

    Source: VMoBA (arXiv 2506.23858), sections 3.3 and 3.4.
    """
    _check_qkv(q=q, k=k)
    order, bounds = _layout(chunk, q)
    top_k, threshold = _check_selection(select, pool, top_k, threshold, bounds.shape[0] - 1)
    return _op.vmoba_select(q.detach(), k.detach(), order, bounds, select, pool, top_k, threshold, backend)


def vmoba_attention(q, k, v, *, chunk, select: str = "topk", pool: str = "query", top_k: int | None = None,
                    threshold: float | None = None, mask: torch.Tensor | None = None,
                    backend: str = "auto") -> torch.Tensor:
    """o_s = softmax(q_s K_A^T / sqrt(D)) V_A, A the tokens of the chunks that `vmoba_select` gives (h, s).

    Args:
        q, k, v: [B, H, S, D], one floating dtype, tokens in the caller's order; 1 <= D <= 256. Any strides.
        chunk, select, pool, top_k, threshold: as in `vmoba_select`.
        mask: bool [B, C, H, S], in place of the selection (whose settings are not read then). A query attends to its
            own chunk also where the mask leaves it out.
        backend: "auto", "triton" (float16, bfloat16, float32), "cpu" (float32, bfloat16; computes in float32),
            "reference" (float64).

    Returns:
        [B, H, S, D] in q's dtype and the caller's token order, contiguous. Gradients reach q, k and v; none goes
        through the selection. An empty batch, or S = 0, gives an empty result.

    Raises:
        ValueError: a wrong shape, dtype, device, chunk, pool, top_k, threshold or mask.
        NotImplementedError: no backend takes these inputs; lists each one's reasons.

    Source: VMoBA (arXiv 2506.23858), section 3; what differs from the published code: docs/attention.md.
    """
    _check_qkv(q=q, k=k, v=v)
    order, bounds = _layout(chunk, q)
    if mask is None:
        top_k, threshold = _check_selection(select, pool, top_k, threshold, bounds.shape[0] - 1)
        mask = _op.vmoba_select(q.detach(), k.detach(), order, bounds, select, pool, top_k, threshold, backend)
    else:
        check_tensor("mask", mask, dim=4)
        if mask.dtype != torch.bool:
            raise expected("mask", "dtype torch.bool", mask.dtype)
        check_shape("mask", mask, (q.shape[0], bounds.shape[0] - 1, q.shape[1], q.shape[2]))
        check_same("mask", mask, q, "q", dtype=False)
    out, _lse = _op.vmoba_attention(q, k, v, order, bounds, mask, backend)
    return out


def _check_qkv(**tensors) -> None:
    q = tensors["q"]
    for name, value in tensors.items():
        check_tensor(name, value, dim=4, floating=True)
        check_same(name, value, q, "q")
        check_shape(name, value, tuple(q.shape))
    check_int("head_dim", q.shape[3], low=1, high=MAX_HEAD_DIM)


def _layout(chunk, q) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(order or None, bounds) of a chunk length or a partition."""
    length = q.shape[2]
    if isinstance(chunk, VMoBAPartition):
        if chunk.num_tokens != length:
            raise expected("chunk", f"a partition of S = {length} tokens", f"one of {chunk.num_tokens}")
        check_same("chunk", chunk.order, q, "q", dtype=False)
        return chunk.order, chunk.bounds
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise expected("chunk", "a chunk length (int) or a vmoba_partition", repr(chunk))
    check_int("chunk", chunk, low=1)
    if length > torch.iinfo(torch.int32).max:
        raise expected("q", "at most 2^31 - 1 tokens a sample", length)
    starts = torch.arange(-(-length // chunk) + 1, device=q.device) * min(chunk, max(length, 1))
    return None, starts.clamp(max=length).to(torch.int32)


def _check_selection(select, pool, top_k, threshold, chunks) -> tuple[int, float]:
    """The setting that the mode reads, checked; the other one at a value that its place in the op's schema takes."""
    check_choice("select", select, tuple(POOLS))
    check_choice(f"pool with select={select!r}", pool, POOLS[select])
    if select == "topk":
        check_int("top_k", top_k, low=1)
        return min(top_k, max(chunks, 1)), 1.0
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise expected("threshold", "a number in (0, 1]", repr(threshold))
    return 1, float(threshold)
