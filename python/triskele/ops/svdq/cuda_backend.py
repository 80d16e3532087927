"""The CUDA kernels behind the 4-bit linear: W4A8 on sm_90, W4A4 on sm_80 … sm_89.

    w4a8   svdq_quantize_int8, then on int4 weights in groups of 64 svdq_multipliers (their scales as integers) and
           svdq_w4a8_gemm; other weights are made int8 first, once a call, with one scale a chunk of columns:
           svdq_widen, svdq_w8a8_gemm
    w4a4   svdq_quantize_int4, svdq_w4a4_gemm: both operands stay 4 bits wide

`native` is where the raw ops are: torch.ops.triskele_native, or the emulated ones in tests.
"""

from __future__ import annotations

import torch

from triskele import _native
from triskele.ops.svdq.reference import activated
from triskele.quantize.formats import pad_columns

DTYPES = (torch.float16, torch.bfloat16)
MOST_RANKS = 128
ALIGNMENT = 16  # bytes: the kernels load so much at once
_COLUMNS = 256  # W4A8 pads K to it
_MOST_GROUPS = 640  # scales rounded to integers add at most 1 % to the error up to here (docs/cuda_linear.md)


def chunk_columns(format: str, group: int) -> int:
    """Columns that share a scale once a weight is 8 bits wide.

    256 adds at most 0.7 % to the error of int4 in groups of 64 or more (docs/cuda_linear.md); smaller groups and nvfp4
    take 64.
    """
    return 256 if format == "int4" and group >= 64 else 64


def why_not(x, qweight, wscales, wtscale, lora_down, *_rest) -> list[str]:
    reasons = []
    if x.dtype not in DTYPES:
        reasons.append(f"takes float16 and bfloat16, got {x.dtype}")
    if x.shape[1] == 0 or x.shape[1] % 8:
        reasons.append(f"takes in_features in multiples of 8, got {x.shape[1]}")
    if lora_down.shape[0] > MOST_RANKS:
        reasons.append(f"takes ranks up to {MOST_RANKS}, got {lora_down.shape[0]}")
    return reasons


def w4a4_why_not(x, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format, *_rest) -> list[str]:
    reasons = why_not(x, qweight, wscales, wtscale, lora_down)
    group = qweight.shape[1] * 2 // wscales.shape[1]
    if format != "int4":
        reasons.append(f"takes weights in int4, got {format}")
    elif group != 64:
        reasons.append(f"takes weights in groups of 64, got {group}")
    return reasons


def w4a4_missing() -> list[str]:
    """Chips after sm_89 take 4-bit integer products apart, slower than the int8 product would be."""
    if reasons := _native.cuda_sm80():
        return reasons
    major, minor = torch.cuda.get_device_capability()
    if major == 8:
        return []
    return [f"needs tensor cores that multiply 4-bit integers (compute capability 8.0 to 8.9), got {major}.{minor}"]


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _operand(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that the kernels read."""
    return (tensor if tensor.dtype in (torch.float32, *DTYPES) else tensor.float()).contiguous()


def _scales(wscales, wtscale) -> torch.Tensor:
    return _operand(wscales) if wtscale is None else wscales.float() * wtscale.float()[:, None]


def w4a8(x, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format, _activation, shift,
         epilogue="none", native=None, widen=None, in_operand=True, clusters=True):
    """x [M, K] float16 or bfloat16 -> [M, N] in its dtype. The factors are used in x's dtype. GELU is not fused here.

    widen       whether weights are made int8 first; None: where they are not int4 in groups of 64
    in_operand  False: group scales multiply sums even where they could multiply codes
    clusters    False: no two blocks share the loads of their tokens
    The last two leave the result as it is, bit for bit.
    """
    native = torch.ops.triskele_native if native is None else native
    group = qweight.shape[1] * 2 // wscales.shape[1]
    codes, token_scales, down, units = native.svdq_quantize_int8(
        _ready(x), _operand(smooth), _ready(lora_down.to(x.dtype)), shift, _COLUMNS)
    tokens = (codes, token_scales, down, units)
    factors = (_ready(pad_columns(lora_up.to(x.dtype), 8)), None if bias is None else _operand(bias))
    if widen is None:
        widen = format != "int4" or group != 64 or wscales.shape[1] > _MOST_GROUPS
    weights = (_ready(qweight), _scales(wscales, wtscale))
    if not widen:
        multipliers = native.svdq_multipliers(*weights, in_operand)
        y = native.svdq_w4a8_gemm(*tokens, weights[0], *multipliers, *factors, clusters)
        return activated(y, epilogue)
    weights = native.svdq_widen(*weights, format == "nvfp4", chunk_columns(format, group))
    return activated(native.svdq_w8a8_gemm(*tokens, *weights, *factors), epilogue)


def w4a4(x, qweight, wscales, _wtscale, lora_down, lora_up, smooth, bias, _format, _activation, shift,
         epilogue="none", native=None):
    """x [M, K] float16 or bfloat16 -> [M, N] in its dtype; shift > 0 promises x + shift >= 0 (codes 0 … 15)."""
    native = torch.ops.triskele_native if native is None else native
    codes, token_scales, down, units = native.svdq_quantize_int4(
        _ready(x), _operand(smooth), _ready(lora_down.to(x.dtype)), shift, shift > 0, 64)
    y = native.svdq_w4a4_gemm(codes, token_scales, down, units, _ready(qweight), _operand(wscales),
                              lora_up.to(x.dtype).contiguous(), None if bias is None else _operand(bias), shift > 0)
    return activated(y, epilogue)
