"""The CUDA entry of sla.forward: csrc/cuda/sla_forward_sm90.cu, for Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from triskele._native import cuda_sm90
from triskele.backend import Backend
from triskele.ops.sla.reference import EPS, Settings

BLOCK_Q, BLOCK_K = 128, 64
"""Of the map. A block that holds a whole shorter sequence is taken too."""

FEATURES, SCOPES = ("softmax", "elu", "relu"), tuple(EPS)


def why_not(q: Tensor, k: Tensor, _v, _block_map, _weight, _bias, _alpha, _key_mask, settings: Settings,
            _parts) -> list[str]:
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"takes float16 and bfloat16, got {q.dtype}")
    if q.shape[3] > 128 or q.shape[3] % 8:
        reasons.append(f"takes head_dim D <= 128 in multiples of 8, got {q.shape[3]}")
    for name, block, taken, length in (("block_q", settings.block_q, BLOCK_Q, q.shape[2]),
                                       ("block_k", settings.block_k, BLOCK_K, k.shape[2])):
        if block != taken and not length <= block < taken:
            reasons.append(f"takes {name} {taken}, got {block}")
    if not settings.scale > 0:
        reasons.append(f"takes a scale above zero, got {settings.scale}")
    if max(q.shape[2], k.shape[2]) >= 2 ** 30:
        reasons.append(f"takes fewer than 2^30 tokens, got {max(q.shape[2], k.shape[2])}")
    return reasons


def loadable(x: Tensor) -> Tensor:
    """x [B, H, L, D] in a layout that TMA takes: contiguous rows at multiples of 16 bytes. A copy if need be."""
    apart = all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in zip(x.shape[:3], x.stride()))
    if x.stride(3) != 1 or not apart:
        x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def forward(q, k, v, block_map, weight, bias, alpha, key_mask, settings: Settings, parts: bool, native=None):
    """(o, o_sparse, o_linear, lse); `native`: where the raw op is, torch.ops.triskele_native unless given."""
    native = torch.ops.triskele_native if native is None else native
    return native.sla_forward(
        loadable(q), loadable(k), loadable(v), block_map.contiguous(), _float32(weight), _float32(bias),
        _float32(alpha), None if key_mask is None else key_mask.contiguous(), settings.block_q, settings.block_k,
        FEATURES.index(settings.feature_map), SCOPES.index(settings.scope), settings.scale, parts)


FORWARD = Backend("cuda", forward, why_not, cuda_sm90)
