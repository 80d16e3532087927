"""The 4-bit formats: codes and scales of a weight, and the activation quantizers.

Weights, one scale a group of columns, divisions in float32, RN_d = rounded to the dtype that scales are stored in:

    int4   s = RN_d(max|r| / 7)                                             code = clamp(round_half_even(r / s), -7, 7)
           or integer multiples of one scale a channel, which scales.py finds
    nvfp4  t = RN_d(max over tensor of (max|r| / 6) / 448)
           s = e4m3(max|r| / 6 / t)                                         code = nearest e2m1 of r / (s t), ties up

A scale of zero becomes one. Activations, with z = x / smooth and every decision made in float32:

    int8   per token               a = max|z|    code = round_half_even(z * (127 / a))     value code * (a / 127)
    int4   per token and 64        the same with 7; unsigned (z >= 0) with 15
    fp8    per token               code = e4m3(z * (448 / a))                              value code * (a / 448)
    nvfp4  per token and 16        s = e4m3(a / 6)                                         value e2m1(z / s) * s
    none                           z itself

A maximum below 1e-30 counts as zero: the values are zero. A token (or group) with NaN or infinity becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from triskele.checks import check_choice, check_int, expected
from triskele.quantize.scales import SCALES, integer_scales

FORMATS = ("int4", "nvfp4")
ACTIVATIONS = ("int8", "int4", "fp8", "nvfp4", "none")
E4M3_MAX = 448.0
TINY = 1e-30
ACTIVATION_GROUP = {"int4": 64, "nvfp4": 16}
_LEVELS = {"int8": 127.0, "int4": 7.0, "fp8": E4M3_MAX}

# e2m1 by code: the sign is bit 3. Sorted, with minus zero left out, it is what rounding searches.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E2M1_SORTED_CODES = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)


def group_size(format: str, group: int = 64) -> int:
    """Columns a scale: `group` for int4, always 16 for nvfp4 (where the default of 64 stands for it)."""
    check_choice("format", format, FORMATS)
    check_int("group", group, low=1)
    if format == "nvfp4":
        if group not in (16, 64):
            raise expected("group with format='nvfp4'", "16", group)
        return 16
    if group % 16:
        raise expected("group", "a multiple of 16", group)
    return group


def check_scales(scales: str, format: str) -> None:
    """Integer multiples are those of int4: a code of e2m1 is not an integer."""
    check_choice("scales", scales, SCALES)
    if scales == "integer" and format != "int4":
        raise expected("scales with format='nvfp4'", "'amax'", repr(scales))


def pad_columns(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Zeros appended to the last dimension up to a multiple."""
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor


def _grouped(tensor: torch.Tensor, group: int) -> torch.Tensor:
    return pad_columns(tensor, group).unflatten(-1, (-1, group))  # [.., G, group]


def e2m1_values(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes 0 … 15 to their values."""
    return torch.tensor(E2M1, dtype=dtype, device=codes.device)[codes.long()]


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code (uint8), exact ties toward +infinity, values beyond 6 clamped."""
    order = torch.tensor(_E2M1_SORTED_CODES, dtype=torch.uint8, device=values.device)
    sorted_values = torch.tensor([E2M1[c] for c in _E2M1_SORTED_CODES], dtype=values.dtype, device=values.device)
    middles = (sorted_values[1:] + sorted_values[:-1]) / 2
    return order[torch.bucketize(values, middles, right=True)]


@dataclass(frozen=True)
class Quantized:
    """codes [N, K] (int8 -7 … 7, or e2m1 codes in uint8), scales [N, G] float32, tensor_scale [1] float32 for nvfp4."""

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None
    format: str
    group: int

    def dequantize(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """code * scale (* tensor scale), [N, K]."""
        return dequantize(self.codes, self.scales, self.tensor_scale, self.format, self.group, dtype)


def dequantize(codes, scales, tensor_scale, format: str, group: int, dtype=torch.float64) -> torch.Tensor:
    """codes [N, K], scales [N, G], tensor_scale None, [1] or [N] -> the values they stand for, [N, K]."""
    values = e2m1_values(codes, dtype) if format == "nvfp4" else codes.to(dtype)
    steps = scales.to(dtype)
    if tensor_scale is not None:
        steps = steps * tensor_scale.to(dtype)[:, None]
    return (_grouped(values, group) * steps[..., None]).flatten(-2)[..., :codes.shape[-1]]


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def quantize_weight(residual: torch.Tensor, format: str = "int4", group: int = 64,
                    dtype: torch.dtype = torch.float32, scales: str = "amax",
                    importance: torch.Tensor | None = None) -> Quantized:
    """residual [N, K] -> 4-bit codes and scales; `dtype` is the one that scales are stored in.

    scales      "amax": max|r| / 7 of each group. "integer" (int4): multiples of one scale a channel (scales.py)
    importance  [K] >= 0, for "integer": what an error of each column counts, the mean square of what it meets
    """
    group = group_size(format, group)
    check_scales(scales, format)
    grouped = _grouped(residual.float(), group)
    amax = grouped.abs().amax(-1)  # [N, G]
    if format == "int4":
        tensor_scale = None
        steps = _nonzero((amax / 7).to(dtype).float())
        _check_steps(steps, dtype)
        if scales == "integer":
            steps = integer_scales(grouped, dtype, None if importance is None else _grouped(importance.float(), group))
        codes = (grouped / steps[..., None]).round().clamp(-7, 7).to(torch.int8)
    else:
        top = (amax / 6).amax() if amax.numel() else amax.new_zeros(())
        tensor_scale = _nonzero((top / E4M3_MAX).to(dtype).float()).reshape(1)
        steps = _nonzero((amax / 6 / tensor_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float())
        codes = e2m1_codes(grouped / (steps * tensor_scale)[..., None])
        _check_steps(steps, dtype)
    return Quantized(codes.flatten(-2)[..., :residual.shape[-1]], steps, tensor_scale, format, group)


def _check_steps(steps: torch.Tensor, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(steps).all()):
        raise expected("weight", f"values whose group scales are finite in {dtype}", "scales with NaN or infinity")


def activation_codes(z: torch.Tensor, activation: str, unsigned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """z [M, K] float32 -> (codes as float32 values [M, G, group], scales float32 [M, G]); G = 1 for a whole token."""
    check_choice("activation", activation, [a for a in ACTIVATIONS if a != "none"])
    grouped = _grouped(z, ACTIVATION_GROUP[activation]) if activation in ACTIVATION_GROUP else z.unsqueeze(-2)
    if grouped.shape[-1]:
        amax = grouped.abs().amax(-1, keepdim=True)
    else:
        amax = grouped.new_zeros(*grouped.shape[:-1], 1)
    dead = amax < TINY
    amax = torch.where(torch.isfinite(amax), amax, torch.full_like(amax, float("nan")))
    safe = torch.where(dead, torch.ones_like(amax), amax)
    if activation == "nvfp4":
        scales = _nonzero((safe / 6).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float())
        codes = e2m1_values(e2m1_codes(grouped / scales), torch.float32)
    else:
        levels = 15.0 if unsigned and activation == "int4" else _LEVELS[activation]
        scales = safe / levels
        factor = torch.full_like(safe, levels) / safe  # torch takes `number / tensor` as 1 / tensor * number
        codes = (grouped * factor).clamp(-levels, levels)
        codes = codes.to(torch.float8_e4m3fn).float() if activation == "fp8" else codes.round()
    codes = torch.where(dead | amax.isnan(), torch.zeros_like(codes), codes)
    return codes, torch.where(dead, torch.zeros_like(scales), scales).squeeze(-1)


def fake_quantize_activation(z: torch.Tensor, activation: str, unsigned: bool = False,
                             dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The values that the quantized activations stand for, [M, K] in `dtype`; z [M, K], decided in float32."""
    if activation == "none":
        return z.to(dtype)
    codes, scales = activation_codes(z.float(), activation, unsigned)
    return (codes.to(dtype) * scales.to(dtype)[..., None]).flatten(-2)[..., :z.shape[-1]]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """codes [N, K], K even -> uint8 [N, K/2]: column 2i in the low nibble of byte i, two's complement for int4."""
    nibbles = codes.to(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, format: str) -> torch.Tensor:
    """uint8 [N, K/2] -> codes [N, K]: int8 -8 … 7 for int4, uint8 0 … 15 for nvfp4."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return ((nibbles ^ 8).to(torch.int8) - 8) if format == "int4" else nibbles
