"""VMoBA in plain torch and float64: the truth that every kernel is held to.

Throughout: q, k, v [B, H, S, D] with tokens in the caller's order; `order` int64 [S] or None (the tokens are in chunk
order already); `bounds` int32 [C + 1] over positions in chunk order; masks bool [B, C, H, S] by the caller's token.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

EPS = 1e-6
"""Added to the sum of the normalised gates; also the spread at and below which gates are not divided by it."""

_SCORES_AT_ONCE = 1 << 24


def chunk_of_tokens(order, bounds, length: int) -> torch.Tensor:
    """int64 [S]: the chunk of each token."""
    starts = bounds[1:-1].contiguous()
    chunk = torch.searchsorted(starts, torch.arange(length, device=bounds.device, dtype=starts.dtype), right=True)
    return chunk if order is None else torch.empty_like(chunk).scatter_(0, order, chunk)


def self_mask(order, bounds, length: int) -> torch.Tensor:
    """bool [C, S]: the chunk that holds each token."""
    chunks = torch.arange(bounds.shape[0] - 1, device=bounds.device)
    return chunks[:, None] == chunk_of_tokens(order, bounds, length)[None]


def gates(q, k, order, bounds) -> torch.Tensor:
    """g[c, h, s] = q_s . mean(K_c), float32 [B, C, H, S]: summed in float64, rounded once."""
    if q.shape[2] == 0:
        return q.new_empty((q.shape[0], 0, q.shape[1], 0), dtype=torch.float32)
    rows = (k if order is None else k[:, :, order]).double()
    mean = torch.stack([rows[:, :, begin:end].mean(2) for begin, end in pairwise(bounds.tolist())], 2)
    return torch.einsum("bhcd,bhsd->bchs", mean, q.double()).float()


def select(q, k, order, bounds, mode: str, pool: str, top_k: int, threshold: float) -> torch.Tensor:
    """bool [B, C, H, S]: the chunks that each query attends to, its own always among them.

    Equal gates rank by chunk, then head, then token.
    """
    gate = gates(q, k, order, bounds)
    batch, chunks, heads, length = gate.shape
    own = self_mask(order, bounds, length)[None, :, None, :].expand(gate.shape)
    if gate.numel() == 0:
        return own.clone()
    gate, own_pooled = _pooled(gate, pool), _pooled(own, pool)
    ranking = gate.argsort(dim=-1, descending=True, stable=True)
    # Own chunks go last: they are in anyway.
    ranking = ranking.gather(-1, own_pooled.gather(-1, ranking).int().argsort(dim=-1, stable=True))
    rank = torch.empty_like(ranking).scatter_(-1, ranking, torch.arange(ranking.shape[-1], device=q.device)
                                              .expand(ranking.shape))
    if mode == "topk":
        per_row = {"query": 1, "head": length, "all": heads * length}[pool]
        count = torch.full_like(rank[..., :1], (top_k - 1) * per_row)
    else:
        count = _threshold_count(gate.double(), own_pooled, ranking, threshold)
    chosen = (rank < count) | own_pooled
    return _unpooled(chosen, pool, (batch, chunks, heads, length))


def _threshold_count(gate, own, ranking, threshold):
    """How many of the other chunks a pool keeps, int64 [..., 1]: the shortest non-empty descending prefix that brings
    the share of the normalised gates, own chunks included, to `threshold`; all of them when none does."""
    others = (~own).sum(-1, keepdim=True)
    low, high = gate.amin(-1, keepdim=True), gate.amax(-1, keepdim=True)
    spread = torch.where(high - low > EPS, high - low, torch.ones_like(high))
    norm = (gate - low) / spread
    total = norm.sum(-1, keepdim=True) + EPS
    rest = (threshold - (norm * own).sum(-1, keepdim=True) / total).clamp(min=0)
    ranked = norm.masked_fill(own, 0.0).gather(-1, ranking)
    reached = ranked.cumsum(-1) / total >= rest
    if threshold >= 1:  # the sum stays EPS below the total: decided here, since rounding could say otherwise
        reached = torch.zeros_like(reached)
    first = reached.int().argmax(-1, keepdim=True) + 1
    return torch.where(reached.any(-1, keepdim=True), torch.minimum(first, others), others)


def _pooled(x, pool):
    """[B, C, H, S] -> pools in front, their entries last and in (chunk, head, token) order."""
    if pool == "query":
        return x.permute(0, 2, 3, 1)
    if pool == "block":
        return x.flatten(2)
    if pool == "head":
        return x.transpose(1, 2).flatten(2)
    return x.flatten(1)


def _unpooled(x, pool, shape):
    batch, chunks, heads, length = shape
    if pool == "query":
        x = x.permute(0, 3, 1, 2)
    elif pool == "head":
        x = x.reshape(batch, heads, chunks, length).transpose(1, 2)
    return x.reshape(shape).contiguous()


def _rows_at_once(q) -> int:
    return max(1, _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * q.shape[2]))


def _attended(mask, chunk_of, rows) -> torch.Tensor:
    """bool [B, H, rows, S]: the keys that each of these queries sees."""
    own = chunk_of[rows][:, None] == chunk_of[None]
    return mask[..., rows].permute(0, 2, 3, 1)[..., chunk_of] | own


def attention(q, k, v, order, bounds, mask):
    """o_s = softmax(q_s K^T / sqrt(D)) V over the chunks of `mask` and the query's own; natural lse [B, H, S]."""
    length, scale = q.shape[2], q.shape[3] ** -0.5
    chunk_of = chunk_of_tokens(order, bounds, length)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)
    step = _rows_at_once(q)
    for start in range(0, length, step):
        rows = slice(start, start + step)
        scores = q[:, :, rows].double() @ k.double().mT * scale
        scores = scores.masked_fill(~_attended(mask, chunk_of, rows), -math.inf)
        out[:, :, rows] = (scores.softmax(-1) @ v.double()).to(q.dtype)
        lse[:, :, rows] = scores.logsumexp(-1).float()
    return out, lse


def attention_backward(grad, q, k, v, out, lse, order, bounds, mask):
    """dV = P^T dO; dS = P (dO V^T - rowsum(dO O)); dQ = dS K / sqrt(D); dK = dS^T Q / sqrt(D). The mask has none.

    P is computed anew, and O with it: in float64 the saved ones would be the least exact numbers here.
    """
    length, scale = q.shape[2], q.shape[3] ** -0.5
    chunk_of = chunk_of_tokens(order, bounds, length)
    key, value = k.double(), v.double()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(key), torch.zeros_like(value)
    step = _rows_at_once(q)
    for start in range(0, length, step):
        rows = slice(start, start + step)
        query, upstream = q[:, :, rows].double(), grad[:, :, rows].double()
        scores = query @ key.mT * scale
        share = scores.masked_fill(~_attended(mask, chunk_of, rows), -math.inf).softmax(-1)
        dshare = upstream @ value.mT
        dscores = share * (dshare - (share * dshare).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = (dscores @ key).to(q.dtype)
        dk += dscores.mT @ query
        dv += share.mT @ upstream
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
