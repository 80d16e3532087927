"""Tables of the adaLN ops: adaln.modulate, adaln.gate, and their backwards, which have the reference alone so far."""

from __future__ import annotations

import torch

from triskele import _native
from triskele.backend import Backend, register
from triskele.ops.adaln import reference, triton_backend


def _cpu_why_not(x, *_rest) -> list[str]:
    return [] if x.dtype in (torch.float32, torch.bfloat16) else [f"takes float32 and bfloat16, got {x.dtype}"]


CHANNELS_CUDA = 8192  # of a token that the CUDA kernels hold in registers


def _cuda_why_not(x, *_rest) -> list[str]:
    reasons = []
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"takes float32, float16 and bfloat16, got {x.dtype}")
    if x.shape[2] > CHANNELS_CUDA:
        reasons.append(f"takes up to {CHANNELS_CUDA} channels, got {x.shape[2]}")
    return reasons


def _unit_channels(value: torch.Tensor) -> torch.Tensor:
    """Any strides but the last: a chunk of a wider projection is read in place."""
    if value.stride(-1) == 1 or value.shape[-1] == 1:
        return value
    return value.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves an empty tensor's strides


def _float32(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else _unit_channels(value.float())


def _index(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.contiguous()


def _native_modulate(x, scale, shift, row_index, weight, bias, eps):
    return torch.ops.triskele_native.adaln_modulate(
        _unit_channels(x), _float32(scale), _float32(shift), _index(row_index), _float32(weight), _float32(bias), eps)


def _native_gate(residual, x, gate, row_index):
    return torch.ops.triskele_native.adaln_gate(_unit_channels(residual), _unit_channels(x), _float32(gate),
                                                _index(row_index))


register("adaln.modulate", (
    Backend("cuda", _native_modulate, _cuda_why_not, _native.cuda_sm80),
    Backend("triton", triton_backend.modulate, triton_backend.why_not, _native.triton_package),
    Backend("cpu", _native_modulate, _cpu_why_not, _native.cpu_library),
    Backend("reference", reference.modulate),
))
register("adaln.gate", (
    Backend("cuda", _native_gate, _cuda_why_not, _native.cuda_sm80),
    Backend("triton", triton_backend.gate, triton_backend.why_not, _native.triton_package),
    Backend("cpu", _native_gate, _cpu_why_not, _native.cpu_library),
    Backend("reference", reference.gate),
))
register("adaln.modulate_backward", (Backend("reference", reference.modulate_backward),))
register("adaln.gate_backward", (Backend("reference", reference.gate_backward),))
