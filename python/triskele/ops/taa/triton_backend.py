"""The Triton entries of the step's tables: what they refuse, and the way to their launchers. Triton is imported at the
first call, not with the package."""

from __future__ import annotations

import torch

SLOTS = 4  # past rounds that the kernels hold in registers


def reasons(slots: int) -> list[str]:
    return [f"takes memory up to {SLOTS + 1}, got {slots + 1}"] if slots > SLOTS else []


def residual(x, *rest):
    from triskele.triton_kernels import taa

    with torch.cuda.device_of(x):
        return taa.residual(x, *rest)


def gamma(squares, *rest):
    from triskele.triton_kernels import taa

    with torch.cuda.device_of(squares):
        return taa.gamma(squares, *rest)


def update(x, *rest):
    from triskele.triton_kernels import taa

    with torch.cuda.device_of(x):
        return taa.update(x, *rest)
