"""The CUDA entry of sla.backward: csrc/cuda/sla_backward_sm90.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from triskele._native import cuda_sm90
from triskele.backend import Backend
from triskele.ops.sla.reference import Settings

BLOCKS = {"block_q": 128, "block_k": 64}
_CODES = ("softmax", "elu", "relu"), ("all", "complement", "marginal")


def _why_not(q: Tensor, k: Tensor, _v, _map, _o_sparse, _o_linear, _lse, _d_sparse, _d_linear, _d_lse, _mask,
             settings: Settings) -> list[str]:
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"takes float16 and bfloat16, got {q.dtype}")
    if q.shape[3] > 128 or q.shape[3] % 8:
        reasons.append(f"takes head_dim D <= 128 in multiples of 8, got {q.shape[3]}")
    for (name, wanted), x in zip(BLOCKS.items(), (q, k)):
        block = getattr(settings, name)
        if block != wanted and not x.shape[2] <= min(block, wanted):
            reasons.append(f"takes {name} {wanted}, or a single block, got {block}")
    return reasons


def _tiles(x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """What TMA reads: unit stride over D, other strides and the address in 16 bytes. Hidden keys become zeros."""
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None, :, None], 0)
    steps = [stride for stride, size in zip(x.stride()[:3], x.shape) if size > 1]
    if x.stride(3) == 1 and not any(step % 8 for step in steps) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def prepared(q, k, v, block_map, o_sparse, _o_linear, lse, d_sparse, d_linear, d_lse, key_mask, settings: Settings):
    """The arguments of the native op."""
    return (_tiles(q), _tiles(k, key_mask), _tiles(v, key_mask), block_map.contiguous(), _tiles(o_sparse.contiguous()),
            lse.contiguous(), _float32(d_sparse), _float32(d_linear), _float32(d_lse),
            None if key_mask is None else key_mask.contiguous(), settings.block_q, settings.block_k,
            _CODES[0].index(settings.feature_map), _CODES[1].index(settings.scope), settings.scale)


def _backward(*inputs):
    return torch.ops.triskele_native.sla_backward(*prepared(*inputs))


BACKWARD = Backend("cuda", _backward, _why_not, cuda_sm90)
