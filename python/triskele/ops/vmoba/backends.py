"""What can run VMoBA, in order of preference, and what each one refuses."""

from __future__ import annotations

import torch

from triskele import _native
from triskele.backend import Backend, register
from triskele.ops.vmoba import reference, triton_backend

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def _cpu_select(q, k, order, bounds, mode, pool, top_k, threshold):
    if q.dtype == torch.float16:  # exact, and one loop fewer in the kernel
        q, k = q.float(), k.float()
    return torch.ops.triskele_native.vmoba_select(q, k, order, bounds, mode, pool, top_k, threshold)


def _cpu_attention(q, k, v, order, bounds, mask):
    return torch.ops.triskele_native.vmoba_attention(q, k, v, order, bounds, mask)


def _cpu_attention_backward(grad, q, k, v, out, lse, order, bounds, mask):
    return torch.ops.triskele_native.vmoba_attention_backward(grad, q, k, v, out, lse, order, bounds, mask)


def _cpu_why_not(q, *_rest) -> list[str]:
    if q.dtype not in _CPU_DTYPES:
        return [f"takes float32 and bfloat16, got {str(q.dtype).removeprefix('torch.')}"]
    return []


def _cpu_backward_why_not(_grad, q, *_rest) -> list[str]:
    return _cpu_why_not(q)


register("vmoba.select", (
    Backend("triton", triton_backend.select, triton_backend.why_not, missing=triton_backend.missing),
    Backend("cpu", _cpu_select, missing=_native.cpu_library),
    Backend("reference", reference.select),
))
register("vmoba.attention", (
    Backend("triton", triton_backend.attention, triton_backend.why_not, missing=triton_backend.missing),
    Backend("cpu", _cpu_attention, _cpu_why_not, missing=_native.cpu_library),
    Backend("reference", reference.attention),
))
register("vmoba.attention_backward", (
    Backend("triton", triton_backend.attention_backward, triton_backend.backward_why_not,
            missing=triton_backend.missing),
    Backend("cpu", _cpu_attention_backward, _cpu_backward_why_not, missing=_native.cpu_library),
    Backend("reference", reference.attention_backward),
))
