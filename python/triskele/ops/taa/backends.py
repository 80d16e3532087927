"""The tables of the step's three ops: both passes over the window, and the small solve between them."""

from __future__ import annotations

import torch

from triskele import _native
from triskele.backend import Backend, register
from triskele.ops.taa import reference, triton_backend


def _native_run(name: str):
    return lambda *inputs: getattr(torch.ops.triskele_native, name)(*inputs)


SLOTS_CUDA = 4      # past rounds that the CUDA kernels hold in registers
WINDOW_CUDA = 1024  # rows of their shared memory


def _dtype_reasons(x, eps) -> list[str]:
    reasons = []
    if x.dtype not in (torch.float32, torch.float64):
        reasons.append(f"takes states in float32 or float64, got {x.dtype}")
    if eps.dtype not in (x.dtype, torch.bfloat16):
        reasons.append(f"takes eps in the dtype of the states or bfloat16, got {eps.dtype}")
    return reasons


def _cuda_reasons(slots: int, window: int) -> list[str]:
    reasons = []
    if slots > SLOTS_CUDA:
        reasons.append(f"takes memory up to {SLOTS_CUDA + 1}, got {slots + 1}")
    if window > WINDOW_CUDA:
        reasons.append(f"takes windows up to {WINDOW_CUDA} rows, got {window}")
    return reasons


def _residual_cpu(x, eps, *_rest) -> list[str]:
    return _dtype_reasons(x, eps)


def _residual_cuda(x, eps, noise, a, b, c, past_r, order) -> list[str]:
    return _dtype_reasons(x, eps) + _cuda_reasons(len(past_r), len(a))


def _residual_triton(x, eps, noise, a, b, c, past_r, order) -> list[str]:
    return _dtype_reasons(x, eps) + triton_backend.reasons(len(past_r))


def _update_triton(x, residual, past_x, past_r, gamma, eps, *_rest) -> list[str]:
    return _dtype_reasons(x, eps) + triton_backend.reasons(len(past_r))


def _gamma_triton(squares, gram, rhs, limits, lengths, *_rest) -> list[str]:
    return triton_backend.reasons(len(lengths))


def _update_cpu(x, residual, past_x, past_r, gamma, eps, *_rest) -> list[str]:
    return _dtype_reasons(x, eps)


def _update_cuda(x, residual, past_x, past_r, gamma, eps, *_rest) -> list[str]:
    return _dtype_reasons(x, eps) + _cuda_reasons(len(past_r), len(residual))


def _gamma_cuda(squares, gram, rhs, limits, lengths, *_rest) -> list[str]:
    return _cuda_reasons(len(lengths), len(squares))


# The CUDA kernels: csrc/cuda/taa_{residual,gamma,update}_sm80.cu.
RESIDUAL = register("taa.residual", (
    Backend("cuda", _native_run("taa_residual"), why_not=_residual_cuda, missing=_native.cuda_sm80),
    Backend("triton", triton_backend.residual, why_not=_residual_triton, missing=_native.triton_package),
    Backend("cpu", _native_run("taa_residual"), why_not=_residual_cpu, missing=_native.cpu_library),
    Backend("reference", reference.residual),
))
UPDATE = register("taa.update", (
    Backend("cuda", _native_run("taa_update"), why_not=_update_cuda, missing=_native.cuda_sm80),
    Backend("triton", triton_backend.update, why_not=_update_triton, missing=_native.triton_package),
    Backend("cpu", _native_run("taa_update"), why_not=_update_cpu, missing=_native.cpu_library),
    Backend("reference", reference.update),
))
GAMMA = register("taa.gamma", (
    Backend("cuda", _native_run("taa_gamma"), why_not=_gamma_cuda, missing=_native.cuda_sm80),
    Backend("triton", triton_backend.gamma, why_not=_gamma_triton, missing=_native.triton_package),
    Backend("cpu", _native_run("taa_gamma"), missing=_native.cpu_library),
    Backend("reference", reference.gamma),
))
