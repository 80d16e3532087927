"""The Triton entries of the SLA tables: what they refuse, and the way to their launchers.

Triton is imported at the first call, not with the package: it is large, and most machines of this package have no use
for it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def missing() -> list[str]:
    reasons = []
    if find_spec("triton") is None:
        reasons.append("triton is not installed")
    if not torch.cuda.is_available():
        reasons.append("no CUDA device")
    elif torch.cuda.get_device_capability() < (8, 0):
        reasons.append("needs compute capability 8.0 or later, got {}.{}".format(*torch.cuda.get_device_capability()))
    return reasons


def why_not(q: Tensor, k: Tensor, *_rest) -> list[str]:
    reasons = []
    if q.dtype not in DTYPES:
        reasons.append(f"takes float16, bfloat16 and float32, got {q.dtype}")
    if q.shape[3] > 128 or q.shape[3] % 8:
        reasons.append(f"takes head_dim D <= 128 in multiples of 8, got {q.shape[3]}")
    if max(q.shape[2], k.shape[2]) >= 2 ** 30:
        reasons.append(f"takes fewer than 2^30 tokens, got {max(q.shape[2], k.shape[2])}")
    return reasons


def route(q, *rest):
    from triskele.triton_kernels import sla_route

    with torch.cuda.device_of(q):
        return sla_route.route(q, *rest)


def forward(q, *rest):
    from triskele.triton_kernels import sla_forward

    with torch.cuda.device_of(q):
        return sla_forward.forward(q, *rest)


def backward(q, *rest):
    from triskele.triton_kernels import sla_backward

    with torch.cuda.device_of(q):
        return sla_backward.backward(q, *rest)
