"""The Triton entries of the adaLN tables: what they refuse, and the way to their launchers. Triton is imported at the
first call, not with the package."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHANNELS = 16384  # a token is held in registers


def why_not(x: Tensor, *_rest) -> list[str]:
    reasons = []
    if x.dtype not in DTYPES:
        reasons.append(f"takes float16, bfloat16 and float32, got {x.dtype}")
    if x.shape[2] > CHANNELS:
        reasons.append(f"takes up to {CHANNELS} channels, got {x.shape[2]}")
    return reasons


def modulate(x, *rest):
    from triskele.triton_kernels import adaln

    with torch.cuda.device_of(x):
        return adaln.modulate(x, *rest)


def gate(residual, *rest):
    from triskele.triton_kernels import adaln

    with torch.cuda.device_of(residual):
        return adaln.gate(residual, *rest)
