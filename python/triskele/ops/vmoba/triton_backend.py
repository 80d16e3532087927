"""The Triton entries of the VMoBA tables: what they refuse, and the way to their launchers.

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


def why_not(q: Tensor, *_rest) -> list[str]:
    reasons = []
    if q.dtype not in DTYPES:
        reasons.append(f"takes float16, bfloat16 and float32, got {q.dtype}")
    if q.shape[3] > 128 or q.shape[3] % 8:
        reasons.append(f"takes head_dim D <= 128 in multiples of 8, got {q.shape[3]}")
    if q.shape[2] >= 2 ** 30:
        reasons.append(f"takes fewer than 2^30 tokens, got {q.shape[2]}")
    return reasons


def backward_why_not(_grad: Tensor, q: Tensor, *_rest) -> list[str]:
    return why_not(q)


def select(q, *rest):
    from triskele.triton_kernels import vmoba_select

    with torch.cuda.device_of(q):
        return vmoba_select.select(q, *rest)


def attention(q, *rest):
    from triskele.triton_kernels import vmoba_forward

    with torch.cuda.device_of(q):
        return vmoba_forward.forward(q, *rest)


def attention_backward(grad, *rest):
    from triskele.triton_kernels import vmoba_backward

    with torch.cuda.device_of(grad):
        return vmoba_backward.backward(grad, *rest)
