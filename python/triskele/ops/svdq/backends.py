"""The tables of the 4-bit linear, one for each kind of activation: where one has no kernel, the reference stands in.

    svdq.w4a8      int8 per token: cuda (sm_90), triton, cpu, reference
    svdq.w4a4      int4 per token and group of 64: cuda (sm_80 … sm_89), reference
    svdq.w4a8_fp8  e4m3 per token: reference
    svdq.w4a4_fp4  nvfp4 per token and group of 16: reference
    svdq.w4a16     activations as they are: triton, reference
    svdq.backward  reference
"""

from __future__ import annotations

import torch

from triskele import _native
from triskele.backend import Backend, register
from triskele.ops.svdq import cuda_backend, reference, triton_backend

OP_OF_ACTIVATION = {"int8": "svdq.w4a8", "int4": "svdq.w4a4", "fp8": "svdq.w4a8_fp8", "nvfp4": "svdq.w4a4_fp4",
                    "none": "svdq.w4a16"}
_EPILOGUES = tuple(reference.EPILOGUES)
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cpu_why_not(x, qweight, *_rest) -> list[str]:
    reasons = []
    if x.dtype not in _CPU_DTYPES:
        reasons.append(f"takes {', '.join(str(d) for d in _CPU_DTYPES)}, got {x.dtype}")
    return reasons


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that the kernels read."""
    return (tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()).contiguous()


def _cpu(x, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format, _activation, shift, epilogue):
    """Two kernels: quantize and project down; multiply, scale, project up, add the bias, GELU."""
    native = torch.ops.triskele_native
    group = qweight.shape[1] * 2 // wscales.shape[1]
    rows = (x.float() if x.dtype == torch.float16 else x).contiguous()
    codes, token_scales, sums, down = native.svdq_quantize(rows, _stored(smooth), _stored(lora_down), shift, group)
    scales = wscales if wtscale is None else wscales.float() * wtscale.float()[:, None]
    y = native.svdq_gemm(codes, token_scales, sums, down, qweight.contiguous(), _stored(scales), _stored(lora_up),
                         None if bias is None else _stored(bias), format == "nvfp4", rows.dtype == torch.bfloat16,
                         _EPILOGUES.index(epilogue))
    return y.to(x.dtype)


_reference = Backend("reference", reference.svdq_linear)
register("svdq.w4a8", (
    Backend("cuda", cuda_backend.w4a8, cuda_backend.why_not, _native.cuda_sm90),
    Backend("triton", triton_backend.w4a8, triton_backend.why_not, _native.triton_package),
    Backend("cpu", _cpu, _cpu_why_not, _native.cpu_library),
    _reference,
))
register("svdq.w4a16", (
    Backend("triton", triton_backend.w4a16, triton_backend.why_not, _native.triton_package),
    _reference,
))
register("svdq.w4a4", (
    Backend("cuda", cuda_backend.w4a4, cuda_backend.w4a4_why_not, cuda_backend.w4a4_missing),
    _reference,
))
for _op in ("svdq.w4a8_fp8", "svdq.w4a4_fp4"):
    register(_op, (_reference,))
register("svdq.backward", (Backend("reference", reference.svdq_linear_backward),))
