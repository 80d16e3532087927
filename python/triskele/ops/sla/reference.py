"""Sparse-linear attention and its block routing in plain torch, float64: the truth that every kernel is held to.

Dense formulas with masks, a few query rows at a time, so that a few thousand tokens need no quadratic memory. The
backward is written out rather than left to autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = {"all": 1e-5, "complement": 0.0, "marginal": 0.0}
"""Added to the linear branch's denominator, by scope."""

_ELEMENTS = 1 << 22
"""Of the largest temporary: rows are taken so many at a time."""


@dataclass(frozen=True)
class Settings:
    """What the forward and the backward share besides tensors.

    block_q, block_k   tokens a block
    feature_map        phi: "softmax" over D, "elu" (elu(x) + 1) or "relu", of unscaled q and k
    scope              blocks of the linear branch: "all", "complement" (not critical) or "marginal" (map 0)
    scale              of q k^T in the sparse branch
    """

    block_q: int
    block_k: int
    feature_map: str
    scope: str
    scale: float


# ------------------------------------------------------------------------------------------------ routing

def block_mean(x: Tensor, block: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the visible rows of every block of x [B, H, L, D] -> [B, H, N, D]; and which blocks have one [B, N]."""
    batch, _, length, _ = x.shape
    count = -(-length // block)
    visible = x.new_ones(batch, length) if mask is None else mask.to(x.dtype)
    if mask is not None:
        x = x.masked_fill(~mask[:, None, :, None], 0)
    pad = count * block - length
    sums = torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (count, block)).sum(3)
    rows = torch.nn.functional.pad(visible, (0, pad)).unflatten(1, (count, block)).sum(2)
    return sums / rows.clamp(min=1)[:, None, :, None], rows > 0


def route(q, k, n_keep, n_drop, block_q, block_k, keep_keys=None, key_mask=None) -> Tensor:
    """1 for the n_keep best blocks of a row and those with a keep_keys token, -1 for the n_drop worst, else 0."""
    queries, _ = block_mean(q.double(), block_q)
    keys, seen = block_mean(k.double(), block_k, key_mask)
    scores = (queries @ keys.mT).nan_to_num(nan=-torch.finfo(torch.float64).max)
    seen = seen[:, None, None, :].expand(scores.shape)
    order = scores.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True, stable=True)  # lowest index first
    rank = order.argsort(dim=-1)
    critical = rank < n_keep
    if keep_keys is not None:
        pad = -keep_keys.shape[1] % block_k
        kept = torch.nn.functional.pad(keep_keys, (0, pad)).unflatten(1, (-1, block_k)).any(2)
        critical = critical | kept[:, None, None, :]
    critical = critical & seen
    negligible = (rank >= scores.shape[-1] - n_drop) & ~critical
    return critical.to(torch.int8) - negligible.to(torch.int8)


# ------------------------------------------------------------------------------------------------ forward

def feature(x: Tensor, kind: str) -> Tensor:
    """phi(x)."""
    if kind == "softmax":
        return x.softmax(-1)
    if kind == "elu":  # elu(x) + 1 without its cancellation: e^x stays above zero
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return x.relu()


def feature_backward(x: Tensor, phi: Tensor, grad: Tensor, kind: str) -> Tensor:
    """d phi(x) -> d x."""
    if kind == "softmax":
        return phi * (grad - (grad * phi).sum(-1, keepdim=True))
    return grad * (phi.clamp(max=1) if kind == "elu" else (x > 0).to(x.dtype))


class _Rows:
    """The token masks of a few query rows at a time."""

    def __init__(self, q, k, block_map, key_mask, settings: Settings):
        self.lengths = q.shape[2], k.shape[2]
        self.map, self.mask, self.settings = block_map, key_mask, settings
        width = max(1, q.shape[0] * q.shape[1] * max(self.lengths[1], q.shape[3]))
        self.step = max(1, _ELEMENTS // width)

    def __iter__(self):
        """(rows, critical [B, H, R, Lk], covered by the linear branch [B, H, R, Lk])."""
        block_of_key = torch.arange(self.lengths[1], device=self.map.device) // self.settings.block_k
        for start in range(0, self.lengths[0], self.step):
            stop = min(start + self.step, self.lengths[0])
            block_of_row = torch.arange(start, stop, device=self.map.device) // self.settings.block_q
            kind = self.map[:, :, block_of_row][..., block_of_key]
            critical = kind == 1
            covered = {"all": torch.ones_like(critical), "complement": ~critical, "marginal": kind == 0}
            covered = covered[self.settings.scope]
            if self.mask is not None:
                visible = self.mask[:, None, None, :]
                critical, covered = critical & visible, covered & visible
            yield slice(start, stop), critical, covered


def _hide(x: Tensor, key_mask: Tensor | None, compute: torch.dtype) -> Tensor:
    """Rows that nobody sees may hold anything, NaN too."""
    x = x.to(compute)
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def _scores(q, k, critical, scale) -> Tensor:
    return (scale * q @ k.mT).masked_fill(~critical, -torch.inf)


def _softmax(scores, critical) -> tuple[Tensor, Tensor]:
    """(weights, lse); a row without keys has the weights 0, not NaN."""
    lse = scores.logsumexp(-1)
    return torch.where(critical, scores - lse[..., None], -torch.inf).exp(), lse


def _divide(x: Tensor, n: Tensor) -> Tensor:
    """x / n, zero where n is."""
    return torch.where(n == 0, 0, x / torch.where(n == 0, 1, n))


def branches(q, k, v, block_map, key_mask, settings: Settings, linear=True, compute=torch.float64):
    """(o_sparse, o_linear or None, lse [B, H, Lq]) in the precision of the arithmetic, `compute`: float64 is the truth,
    the input's own dtype gives the error that a kernel of that precision may have.

    o_sparse = softmax over critical keys of (scale q k^T) v; o_linear = phi(q) H / (phi(q) Z + eps), with H and Z the
    sums of phi(k)^T v and phi(k) over the scope's keys.
    """
    q, k, v = q.to(compute), _hide(k, key_mask, compute), _hide(v, key_mask, compute)
    o_sparse, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    o_linear = torch.zeros_like(q) if linear else None
    phi_q, phi_k = feature(q, settings.feature_map), feature(k, settings.feature_map)
    for rows, critical, covered in _Rows(q, k, block_map, key_mask, settings):
        p, lse[:, :, rows] = _softmax(_scores(q[:, :, rows], k, critical, settings.scale), critical)
        o_sparse[:, :, rows] = p @ v
        if linear:
            a = torch.where(covered, phi_q[:, :, rows] @ phi_k.mT, 0)
            n = a.sum(-1, keepdim=True) + EPS[settings.scope]
            o_linear[:, :, rows] = _divide(a @ v, n)
    return o_sparse, o_linear, lse


def forward(q, k, v, block_map, weight, bias, alpha, key_mask, settings: Settings, parts: bool):
    """(o, o_sparse, o_linear, lse) in q's dtype, lse in float32; the two middle ones empty unless `parts`.

    o = o_sparse; with a projection + o_linear W^T + b; with alpha instead alpha o_sparse + (1 - alpha) o_linear.
    """
    linear = parts or weight is not None or alpha is not None
    o_sparse, o_linear, lse = branches(q, k, v, block_map, key_mask, settings, linear)
    o = o_sparse
    if weight is not None:
        o = o_sparse + o_linear @ weight.double().mT
        if bias is not None:
            o = o + bias.double()
    elif alpha is not None:
        mix = alpha.double()[..., None]
        o = mix * o_sparse + (1 - mix) * o_linear
    kept = (o_sparse, o_linear) if parts else (o.new_empty(0), o.new_empty(0))
    copies = [x.to(q.dtype, copy=True) for x in (o, *kept)]
    return *copies, lse.to(torch.float32, copy=True)


# ------------------------------------------------------------------------------------------------ backward

def backward(q, k, v, block_map, _o_sparse, _o_linear, _lse, d_sparse, d_linear, d_lse, key_mask, settings: Settings):
    """(dq, dk, dv) from the gradients of o_sparse, o_linear (None: no linear branch) and lse (None: zero).

    P = exp(S - L), dS = P (dP - rowsum(P dP) + dL), dP = dO_s V^T; with A = phi(q) phi(k)^T over the scope's keys and n
    its row sums + eps: dA = (dO_l V^T - rowsum(A dO_l V^T) / n) / n, dphi(q) = dA phi(k), dphi(k) = dA^T phi(q),
    dv = P^T dO_s + A^T (dO_l / n).

    P and A are computed anew, and the rows' sums with them: the saved outputs are rounded to the input's dtype, lse to
    float32, and would be the least exact numbers here.
    """
    dtype = q.dtype
    q, k, v = q.double(), _hide(k, key_mask, torch.float64), _hide(v, key_mask, torch.float64)
    d_sparse = d_sparse.double()
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if d_linear is not None:
        d_linear = d_linear.double()
        phi_q, phi_k = feature(q, settings.feature_map), feature(k, settings.feature_map)
        d_phi_q, d_phi_k = torch.zeros_like(q), torch.zeros_like(k)
    for rows, critical, covered in _Rows(q, k, block_map, key_mask, settings):
        p = _softmax(_scores(q[:, :, rows], k, critical, settings.scale), critical)[0]
        dp = d_sparse[:, :, rows] @ v.mT
        offset = (p * dp).sum(-1, keepdim=True)
        if d_lse is not None:
            offset = offset - d_lse[:, :, rows, None].double()
        ds = p * (dp - offset)
        dq[:, :, rows] = settings.scale * ds @ k
        dk += settings.scale * ds.mT @ q[:, :, rows]
        dv += p.mT @ d_sparse[:, :, rows]
        if d_linear is not None:
            a = torch.where(covered, phi_q[:, :, rows] @ phi_k.mT, 0)
            n = a.sum(-1, keepdim=True) + EPS[settings.scope]
            da = d_linear[:, :, rows] @ v.mT
            da = torch.where(covered, _divide(da - _divide((a * da).sum(-1, keepdim=True), n), n), 0)
            d_phi_q[:, :, rows] = da @ phi_k
            d_phi_k += da.mT @ phi_q[:, :, rows]
            dv += a.mT @ _divide(d_linear[:, :, rows], n)
    if d_linear is not None:
        dq += feature_backward(q, phi_q, d_phi_q, settings.feature_map)
        dk += feature_backward(k, phi_k, d_phi_k, settings.feature_map)
    if key_mask is not None:
        dk, dv = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)
