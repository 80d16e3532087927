"""Hostile inputs: the layouts and values that break kernels."""

from __future__ import annotations

import torch


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with every stride changed: a view into a larger, NaN-filled buffer."""
    shape = [2 * s + 1 for s in tensor.shape]
    if tensor.dtype.is_floating_point:
        big = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    else:
        big = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    view = big[tuple(slice(1, 1 + 2 * s, 2) for s in tensor.shape)]
    view.copy_(tensor)
    return view


def heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] as a view of [B, L, H, D]: how diffusers' processors hold it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def poisoned(tensor: torch.Tensor, margin: int = 64) -> torch.Tensor:
    """The same contiguous values inside a buffer whose margins on both sides are NaN (or the dtype's largest)."""
    fill = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    big = torch.full((tensor.numel() + 2 * margin,), fill, dtype=tensor.dtype, device=tensor.device)
    inner = big[margin:margin + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def with_outliers(tensor: torch.Tensor, scale: float = 100.0, share: float = 0.01) -> torch.Tensor:
    """A copy in which a share of the elements is `scale` times larger."""
    mask = torch.rand(tensor.shape, device=tensor.device) < share
    return torch.where(mask, tensor * scale, tensor)
