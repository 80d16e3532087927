"""The public functions of the SLA family; arguments are checked here, once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triskele.backend import NAMES
from triskele.checks import check_choice, check_int, check_same, check_shape, check_tensor, expected
from triskele.ops.sla.op import sla_attention, sla_route

FEATURE_MAPS = ("softmax", "elu", "relu")
SCOPES = ("all", "complement", "marginal")


def _check_heads(q: Tensor, **others: Tensor) -> None:
    """q, k, v: [B, H, L, D] of one dtype, device, B, H and D."""
    check_tensor("q", q, dim=4, floating=True)
    if not 1 <= q.shape[3] <= 256:
        raise expected("q", "head_dim D in 1..256", q.shape[3])
    for name, x in others.items():
        check_tensor(name, x, dim=4, floating=True)
        check_same(name, x, q, "q")
        check_shape(name, x, (q.shape[0], q.shape[1], None, q.shape[3]))


def _check_mask(name: str, mask, k: Tensor) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise expected(name, "dtype torch.bool", mask.dtype)
    check_same(name, mask, k, "k", dtype=False)
    check_shape(name, mask, (k.shape[0], k.shape[2]))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _block_count(name: str, value, blocks: int, *, zero: bool) -> int:
    """keep or drop -> a number of blocks."""
    if not _is_number(value):
        raise expected(name, "a share" if zero else "a share or a number of blocks", repr(value))
    if isinstance(value, int) and not zero:
        check_int(name, value, low=1)
        return min(value, blocks)
    if zero and not 0 <= value < 1:
        raise expected(name, "a share in [0, 1)", value)
    if not zero and not 0 < value <= 1:
        raise expected(name, "a share in (0, 1], or an integer >= 1", value)
    return math.floor(value * blocks) if zero else min(blocks, max(1, math.floor(value * blocks)))


def _keep_mask(keep_keys, k: Tensor) -> Tensor | None:
    """bool [Lk] or [B, Lk], or (start, stop) pairs -> bool [B or 1, Lk]."""
    if keep_keys is None:
        return None
    length = k.shape[2]
    if not isinstance(keep_keys, Tensor):
        if not isinstance(keep_keys, Sequence) or isinstance(keep_keys, str):
            raise expected("keep_keys", "a bool tensor or a list of (start, stop)", repr(keep_keys))
        mask = torch.zeros(1, length, dtype=torch.bool, device=k.device)
        for pair in keep_keys:
            whole = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(at, int) for at in pair)
            if not whole or not 0 <= pair[0] <= pair[1] <= length:
                raise expected("keep_keys", f"pairs (start, stop) within 0..{length}", repr(pair))
            mask[:, pair[0]:pair[1]] = True
        return mask
    if keep_keys.dtype != torch.bool:
        raise expected("keep_keys", "dtype torch.bool", keep_keys.dtype)
    check_same("keep_keys", keep_keys, k, "k", dtype=False)
    if keep_keys.dim() == 1:
        check_shape("keep_keys", keep_keys, (length,))
        return keep_keys[None]
    check_shape("keep_keys", keep_keys, (k.shape[0], length))
    return keep_keys


def route_blocks(q: Tensor, k: Tensor, keep: float = 0.05, drop: float = 0.0, block_q: int = 128, block_k: int = 64,
                 keep_keys=None, key_mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """map = rank of mean(q block) . mean(k block) in its row: 1 for the best `keep`, -1 for the worst `drop`, else 0.

    The means and scores are at least float32 whatever the inputs' dtype; blocks that tie rank by index, lowest first.
    The map carries no gradient. With Nk = ceil(Lk / block_k) key blocks:

    Args:
        q, k: [B, H, Lq, D] and [B, H, Lk, D], floating point, D in 1..256, any strides. The last block of each may be
            short: its mean is over the rows it has.
        keep: share in (0, 1] of a row's key blocks that is critical, max(1, floor(keep * Nk)); or an int, that many
            (all where it exceeds Nk).
        drop: share in [0, 1) that is negligible, floor(drop * Nk); a critical block is never dropped.
        block_q, block_k: tokens a block, >= 1.
        keep_keys: keys that every query must see: bool [Lk] or [B, Lk], or a list of (start, stop). Blocks that hold
            one are critical on top of `keep`: the `keep` best are chosen among all blocks as without it.
        key_mask: bool [B, Lk]; False keys enter no mean. A block without a visible key ranks last and is never
            critical, keep_keys or not.
        backend: "auto", or one by name.

    Returns:
        int8 [B, H, ceil(Lq / block_q), Nk]: 1 critical, 0 marginal, -1 negligible.

    Raises:
        ValueError: a wrong shape, dtype or device; keep outside (0, 1]; keep + drop > 1.

    Source: arXiv 2509.24006, section 4 (the order needs neither its softmax nor its scale).
    """
    _check_heads(q, k=k)
    check_int("block_q", block_q, low=1)
    check_int("block_k", block_k, low=1)
    check_choice("backend", backend, ("auto", *NAMES))
    blocks = (k.shape[2] + block_k - 1) // block_k
    n_keep, n_drop = _block_count("keep", keep, blocks, zero=False), _block_count("drop", drop, blocks, zero=True)
    if isinstance(keep, float) and keep + drop > 1:
        raise expected("keep + drop", "at most 1", keep + drop)
    if key_mask is not None:
        _check_mask("key_mask", key_mask, k)
    kept = _keep_mask(keep_keys, k)
    return sla_route(q.detach(), k.detach(), n_keep, n_drop, block_q, block_k, kept, key_mask, backend)


def _check_map(block_map, q: Tensor, k: Tensor, block_q: int, block_k: int) -> None:
    check_tensor("map", block_map, dim=4)
    if block_map.dtype != torch.int8:
        raise expected("map", "dtype torch.int8", block_map.dtype)
    check_same("map", block_map, q, "q", dtype=False)
    rows, blocks = (q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k
    check_shape("map", block_map, (*q.shape[:2], rows, blocks))
    if torch.compiler.is_compiling() or type(block_map) is not Tensor or block_map.device.type != "cpu":
        return  # its values are unknown here, or asking for them would make the host wait
    if block_map.numel() and (block_map.amin() < -1 or block_map.amax() > 1):
        raise expected("map", "values -1, 0 or 1", f"{int(block_map.amin())} to {int(block_map.amax())}")


def sparse_linear_attention(q: Tensor, k: Tensor, v: Tensor, map: Tensor, block_q: int = 128, block_k: int = 64,
                            feature_map: str = "softmax", scope: str = "all", proj_weight: Tensor | None = None,
                            proj_bias: Tensor | None = None, alpha: Tensor | float | None = None,
                            key_mask: Tensor | None = None, scale: float | None = None, backend: str = "auto",
                            return_parts: bool = False):
    """o = softmax over critical keys of (scale q k^T) v  +  [phi(q) H / (phi(q) Z + eps)] W^T + b.

    H and Z are the sums over the scope's keys of phi(k)^T v and of phi(k). Without projection and alpha the second term
    is absent. With `alpha`, o = alpha o_sparse + (1 - alpha) o_linear (SLA2). Differentiable in q, k, v, proj_weight,
    proj_bias and alpha; the map carries no gradient.

    Args:
        q, k, v: [B, H, Lq, D], [B, H, Lk, D], [B, H, Lk, D]; one floating-point dtype, D in 1..256, any strides.
        map: int8 [B, H, ceil(Lq / block_q), ceil(Lk / block_k)] from `route_blocks`: 1 critical, 0 marginal,
            -1 negligible. (Values are checked on CPU tensors outside compilation.)
        block_q, block_k: tokens a block.
        feature_map: phi, of unscaled q and k: "softmax" over D, "elu" (elu(x) + 1), "relu".
        scope: what the linear branch covers. "all": every key, eps = 1e-5 (thu-ml/SLA main, TurboDiffusion);
            "complement": blocks that are not critical, eps = 0 (branch SLA-1); "marginal": blocks of map 0, eps = 0
            (the papers). Where the denominator is zero, o_linear is zero.
        proj_weight, proj_bias: W [D, D] (out, in) and b [D]; b needs W.
        alpha: broadcastable to [B, H, Lq], not together with a projection.
        key_mask: bool [B, Lk]; False keys are seen by neither branch and get zero gradients.
        scale: of the scores; None: 1 / sqrt(D).
        backend: "auto", or one by name.
        return_parts: also give the parts.

    Returns:
        o [B, H, Lq, D] in q's dtype; with return_parts (o, o_sparse, o_linear before the projection, lse), lse float32
        [B, H, Lq], natural log, of the scaled scores over critical keys. A row that sees no critical key has
        o_sparse = 0 and lse = -inf. All four are differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device, choice or map value; alpha together with a projection.
        NotImplementedError: no backend takes the inputs (`backend` by name); lists each one's reasons.

    Source: arXiv 2509.24006, sections 4-5 and github.com/thu-ml/SLA; alpha: arXiv 2602.12675.
    """
    _check_heads(q, k=k, v=v)
    check_shape("v", v, tuple(k.shape))
    check_int("block_q", block_q, low=1)
    check_int("block_k", block_k, low=1)
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    check_choice("scope", scope, SCOPES)
    check_choice("backend", backend, ("auto", *NAMES))
    _check_map(map, q, k, block_q, block_k)
    head_dim = q.shape[3]
    if proj_weight is not None:
        check_tensor("proj_weight", proj_weight, floating=True)
        check_same("proj_weight", proj_weight, q, "q", dtype=False)
        check_shape("proj_weight", proj_weight, (head_dim, head_dim))
    if proj_bias is not None:
        if proj_weight is None:
            raise expected("proj_bias", "proj_weight beside it", "proj_weight=None")
        check_tensor("proj_bias", proj_bias, floating=True)
        check_same("proj_bias", proj_bias, q, "q", dtype=False)
        check_shape("proj_bias", proj_bias, (head_dim,))
    if alpha is not None:
        alpha = _expand_alpha(alpha, q, proj_weight)
    if key_mask is not None:
        _check_mask("key_mask", key_mask, k)
    if scale is not None and not (_is_number(scale) and math.isfinite(scale)):
        raise expected("scale", "a finite number or None", repr(scale))
    scale = head_dim ** -0.5 if scale is None else float(scale)

    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, proj_weight, proj_bias, alpha))
    parts = return_parts or (learns and (proj_weight is not None or alpha is not None))
    out = sla_attention(q, k, v, map, proj_weight, proj_bias, alpha, key_mask, block_q, block_k, feature_map, scope,
                        scale, parts, backend)
    return tuple(out) if return_parts else out[0]


def _expand_alpha(alpha, q: Tensor, proj_weight: Tensor | None) -> Tensor:
    if proj_weight is not None:
        raise expected("alpha", "None together with proj_weight", type(alpha).__name__)
    if _is_number(alpha):
        alpha = torch.tensor(float(alpha), device=q.device)
    check_tensor("alpha", alpha, floating=True)
    check_same("alpha", alpha, q, "q", dtype=False)
    shape = q.shape[:3]
    # (`a in (1, s)` would be False for the symbolic sizes of torch.compile)
    fits = alpha.dim() <= 3 and all(a == 1 or a == s for a, s in zip(reversed(alpha.shape), reversed(shape)))
    if not fits:
        raise expected("alpha", f"broadcastable to {list(shape)}", f"shape {list(alpha.shape)}")
    return alpha.expand(shape)
