"""The CUDA entry of sla.route: csrc/cuda/sla_route_sm80.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from triskele._native import cuda_sm80
from triskele.backend import Backend


def _why_not(q: Tensor, *_rest) -> list[str]:
    taken = (torch.float32, torch.float16, torch.bfloat16)
    return [] if q.dtype in taken else [f"takes float32, float16 and bfloat16, got {q.dtype}"]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _route(q, k, n_keep, n_drop, block_q, block_k, keep_keys, key_mask):
    return torch.ops.triskele_native.sla_route(q, k, n_keep, n_drop, block_q, block_k, _contiguous(keep_keys),
                                               _contiguous(key_mask))


ROUTE = Backend("cuda", _route, _why_not, cuda_sm80)
