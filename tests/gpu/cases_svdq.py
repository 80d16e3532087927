"""The 4-bit linear by kind of activation, and its backward."""

from __future__ import annotations

import torch
from tolerance import assert_within_budget, relative_norm

import triskele as tk
from gpu.family import Case, Op
from triskele.ops.svdq import reference
from triskele.ops.svdq.backends import OP_OF_ACTIVATION
from triskele.quantize.formats import fake_quantize_activation

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16
GROUP = {"int4": 64, "nvfp4": 16}
FOLDED = 0.01
"""Kernels that fold group scales into 8 bits may be this much further from the float64 layer than the fake-quantized
one, relative to the result's norm."""


def weight_of(n, k, rank, generator, format="int4", activation="int8", scales=B16):
    """A weight without a calibration: any codes, scales within a factor of four."""
    groups = -(-k // GROUP[format])
    return tk.quantize.SVDQWeight(
        torch.randint(0, 256, (n, groups * GROUP[format] // 2), dtype=torch.uint8, generator=generator),
        (torch.rand(n, groups, generator=generator) * 0.03 + 0.01).to(scales),
        (torch.randn(rank, k, generator=generator) / k**0.5).to(B16), torch.randn(n, rank, generator=generator).to(B16),
        (torch.rand(k, generator=generator) * 2 + 0.3).to(B16), k, format, activation,
        None if format == "int4" else torch.tensor([0.01]))


def _linear(m, k, n, rank, dtype, activation, *, format="int4", bias=True, outliers=False, shift=0.0, medium=False):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        weight = weight_of(n, k, rank, generator, format, "int4" if activation == "nvfp4" else activation,
                           torch.float8_e4m3fn if format == "nvfp4" else B16)
        x = torch.randn(m, k, generator=generator)
        if outliers:
            x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, 100 * x, x)
            x[0] = 0  # a token that says nothing
        if shift:
            x = x.clamp(min=-shift)
        added = torch.randn(n, generator=generator).to(dtype) if bias else None
        return (x.to(dtype), weight.qweight, weight.wscales, weight.wtscale, weight.lora_down, weight.lora_up,
                weight.smooth, added, format, activation, shift, "none")

    traits = "".join(f", {trait}" for trait, on in
                     (("no bias", not bias), ("outliers", outliers), (f"shift {shift}", shift)) if on)
    return Case(f"{m}x{k}x{n} rank {rank}, {format}, {str(dtype)[6:]}{traits}", make, medium=medium,
                thorough=dtype is B16 and not medium and bool(outliers) and format == "int4")


def compare_linear(arguments, got, exact):
    x, qweight, wscales, wtscale, down, up, smooth, bias, format, activation, shift, _epilogue = arguments
    y, exact = got[0], exact[0]
    assert y.dtype == x.dtype
    z = (x.double() + shift) / smooth.double()
    if activation != "none":
        z = fake_quantize_activation(reference.smoothed(x, smooth, shift), activation, shift > 0)
    weight = reference.weight_float64(qweight, wscales, wtscale, x.shape[1], format)
    rough = z.float() @ weight.float().T + (x.float() @ down.float().T) @ up.float().T
    rough = (rough if bias is None else rough + bias.float()).to(x.dtype)
    if not y.numel():
        assert y.shape == exact.shape
        return
    assert y.isfinite().all(), "not finite"
    assert relative_norm(y, exact) <= relative_norm(rough, exact) + FOLDED, "relative error"
    # no element far out: an index gone wrong hides in a norm
    assert_within_budget(y, exact, rough, floor=(torch.finfo(x.dtype).eps + 4 * FOLDED) * float(exact.abs().max()),
                         what="y")


def _cases(activation):
    grid = [  # M, K, N, rank
        (1, 256, 128, 16), (16, 128, 256, 32), (33, 320, 200, 32), (64, 3072, 64, 32), (130, 192, 136, 0),
        (77, 512, 384, 48), (0, 128, 128, 16)]
    found = [_linear(*size, B16, activation) for size in grid]
    found += [_linear(33, 320, 200, 32, dtype, activation) for dtype in (F16, F32)]
    found += [_linear(40, 256, 256, 32, B16, activation, outliers=True), _linear(5, 128, 128, 16, B16, activation,
                                                                                 bias=False)]
    found += [_linear(19, 256, 128, 16, B16, activation, format="nvfp4")]
    if activation == "int4":
        found.append(_linear(19, 256, 128, 16, B16, activation, shift=0.171875))
    found += [_linear(1024, 3072, 3072, 32, B16, activation, medium=True),
              _linear(300, 3072, 1024, 32, F16, activation, outliers=True, medium=True)]
    return tuple(found)


def _backward(m, k, n, rank, dtype, *, medium=False):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        w = weight_of(n, k, rank, generator)
        grad = torch.randn(m, n, generator=generator).to(dtype)
        return (grad, w.qweight, w.wscales, w.wtscale, w.lora_down, w.lora_up, w.smooth, "int4")

    return Case(f"{m}x{k}x{n} rank {rank}, {str(dtype)[6:]}", make, medium=medium,
                thorough=dtype is B16 and not medium)


def compare_backward(arguments, got, exact):
    grad, qweight, wscales, wtscale, down, up, smooth, format = arguments
    weight = reference.weight_float64(qweight, wscales, wtscale, smooth.shape[0], format).to(grad.dtype)
    rough = grad @ weight / smooth.to(grad.dtype) + (grad @ up.to(grad.dtype)) @ down.to(grad.dtype)
    assert_within_budget(got[0], exact[0], rough, what="dx")


OPS = (
    *(Op(table, "svdq_linear", _cases(activation), compare_linear, relaid=(0,))
      for activation, table in OP_OF_ACTIVATION.items()),
    Op("svdq.backward", "svdq_linear_backward", (
        _backward(33, 320, 200, 32, B16), _backward(33, 320, 200, 32, F32), _backward(256, 1024, 512, 32, B16,
                                                                                      medium=True)),
       compare_backward),
)
