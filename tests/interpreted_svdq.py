"""The 4-bit linear's Triton kernels in the interpreter, on CPU tensors. Run by test_triton_svdq.py, in a process of
its own.

bfloat16 is not to be had there: float32 and float16 stand for all dtypes.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import Vectors, vector_files
from generators import poisoned, strided, with_outliers
from tolerance import assert_within_budget, relative_norm

import triskele as tk
from triskele.ops.svdq import reference, triton_backend
from triskele.quantize.formats import activation_codes, fake_quantize_activation
from triskele.triton_kernels import configs, svdq_prepare

RUN = {"int8": triton_backend.w4a8, "none": triton_backend.w4a16}
SHAPES = [(1, 16, 1, 0), (5, 200, 48, 16), (19, 136, 130, 7), (70, 64, 65, 40)]  # M, K, N, rank: ragged on every side


def make(k, n, rank=4, format="int4", activation="int8", group=64, shift=0.0):
    smooth = torch.rand(k) * 3 + 0.3
    return tk.quantize.svd_quantize(torch.randn(n, k) / k**0.5, rank=min(rank, k, n), format=format, smooth=smooth,
                                    activation=activation, group=group if format == "int4" else 64, iterations=1,
                                    shift=shift)


def arguments(x, w, bias):
    return (x, w.qweight, w.wscales, w.wtscale, w.lora_down, w.lora_up, w.smooth, bias, w.format, w.activation, w.shift)


def run(x, w, bias=None):
    given = arguments(x, w, bias)
    assert triton_backend.why_not(*given) == []
    return RUN[w.activation](*given)


def truth(x, w, bias=None):
    return reference.svdq_linear(*arguments(x.double(), w, bias))


def float32_reference(x, w, bias):
    """The same quantized layer multiplied in float32: the error that any kernel of that precision has."""
    z = reference.smoothed(x, w.smooth, w.shift)
    if w.activation != "none":
        z = fake_quantize_activation(z, w.activation, w.shift > 0, torch.float32)
    return z @ w.dequantize().float().T + (x.float() @ w.lora_down.float().T) @ w.lora_up.float().T + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", RUN)
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("m, k, n, rank", SHAPES)
def test_error_budget(m, k, n, rank, format, activation, dtype):
    w = make(k, n, rank, format, activation, 128 if k == 200 else 64, shift=0.171875 if m == 5 else 0.0)
    x, bias = with_outliers(torch.randn(m, k), 100, 0.05).to(dtype), torch.randn(n)
    y = run(x, w, bias)
    assert y.dtype == dtype and y.shape == (m, n)
    assert_within_budget(y, truth(x, w, bias), float32_reference(x, w, bias).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0.0, 0.171875])
def test_integers_equal_the_reference(dtype, shift):
    w = make(200, 16, shift=shift)
    x = with_outliers(torch.randn(70, 200), 50).to(dtype)
    want, scales = activation_codes(reference.smoothed(x, w.smooth, w.shift), "int8", True)
    for codes_dtype in (torch.int8, torch.float16):
        codes, token_scales, _ = svdq_prepare.quantize(x, w.smooth, w.lora_down, w.shift, 32, codes_dtype)
        ordered = codes.squeeze(2).transpose(2, 3).flatten(1)
        assert torch.equal(ordered[:, :200].float(), want.squeeze(1)) and not ordered[:, 200:].any()
        assert torch.equal(token_scales, scales.squeeze(1))


def test_integers_of_ties_equal_the_reference():
    """z (127 / a) exactly between two integers, and within a rounding of it."""
    x = torch.arange(-254, 255).float()[None] / 2
    x = torch.cat([x, x.nextafter(torch.tensor(1e9)), x.nextafter(torch.tensor(-1e9)), x * 0.7])
    x = torch.cat([x, x[:, :3]], 1)
    want, scales = activation_codes(x, "int8")
    ones, none = torch.ones(512), torch.empty(0, 512)
    codes, token_scales, _ = svdq_prepare.quantize(x, ones, none, 0.0, 32, torch.int8)
    assert torch.equal(codes.squeeze(2).transpose(2, 3).flatten(1).float(), want.squeeze(1))
    assert torch.equal(token_scales, scales.squeeze(1))


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_every_code_and_scale(format):
    """A weight of all 16 codes with scales of one gives exact integers; e4m3 scales of all 127 bytes are decoded."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    ones = torch.ones(64)
    if format == "int4":
        scales = torch.ones(8, 1)
    else:
        scales = torch.arange(32, dtype=torch.uint8).reshape(8, 4).mul(4).clamp(1, 126).view(torch.float8_e4m3fn)
    for activation in RUN:
        w = tk.quantize.SVDQWeight(codes, scales, torch.zeros(0, 64), torch.zeros(8, 0), ones, 64, format, activation,
                                   torch.ones(1) if format == "nvfp4" else None)
        x = torch.randint(-127, 128, (5, 64)).float()
        x[:, 0] = 127
        assert torch.equal(run(x, w).double(), truth(x, w)), activation


@pytest.mark.parametrize("activation", RUN)
def test_wide_rows_and_parts(activation):
    """K over several parts of the projection; tensor scales by row, factors in float16, a long rank."""
    w = make(2120, 40, 36, "nvfp4", activation)
    rows = torch.rand(40) + 0.5
    w = dataclasses.replace(w, wtscale=rows)
    x, bias = torch.randn(3, 2120), torch.randn(40)
    assert_within_budget(run(x, w, bias), truth(x, w, bias), float32_reference(x, w, bias), factor=4)
    half = dataclasses.replace(w, **{name: getattr(w, name).half() for name in ("lora_down", "lora_up", "smooth")})
    assert_within_budget(run(x.half(), half, bias.half()), truth(x.half(), half, bias.half()),
                         float32_reference(x.half(), half, bias.half()).half())


@pytest.mark.parametrize("activation", RUN)
def test_strides_margins_and_empty_batches(activation):
    w, bias = make(96, 33, activation=activation), torch.randn(33)
    x = torch.randn(7, 96)
    want = run(x, w, bias)
    for change in (strided, poisoned, lambda t: t.flip(0).contiguous().flip(0)):
        assert torch.equal(run(change(x), w, change(bias)), want)
        moved = arguments(change(x), w, change(bias))
        moved = tuple(change(t) if isinstance(t, torch.Tensor) and t.dtype != torch.float64 else t for t in moved)
        assert torch.equal(RUN[activation](*moved), want)
    assert run(x[:0], w, bias).shape == (0, 33)
    assert torch.equal(run(x, w), run(x, w, torch.zeros(33)))


@pytest.mark.parametrize("activation", RUN)
def test_zero_and_non_finite_tokens(activation):
    w, bias = make(96, 33, activation=activation), torch.randn(33)
    x = torch.randn(6, 96)
    clean = run(x, w, bias)
    x[1], x[2, 5], x[3, 9], x[4] = 0, float("nan"), float("inf"), 1e-35
    y = run(x, w, bias)
    assert torch.equal(y[1], bias) and torch.allclose(y[4], bias)
    assert bool(y[2].isnan().all()) and not bool(y[3].isfinite().any())
    assert torch.equal(y[[0, 5]], clean[[0, 5]])  # its neighbours do not see it


@pytest.mark.parametrize("activation", RUN)
def test_large_values_do_not_overflow(activation):
    w = make(256, 16, 8, activation=activation)
    for dtype, scale in ((torch.float16, 100.0), (torch.float32, 1e30)):
        x = torch.full((2, 256), scale, dtype=dtype)
        y, want = run(x, w), truth(x, w)
        assert y.isfinite().all() and relative_norm(y, want) < (1e-5 if dtype == torch.float32 else 2e-3)
    small = dataclasses.replace(w, lora_down=w.lora_down * 0, smooth=torch.full((256,), 1e-3))
    x = torch.full((1, 256), 100.0, dtype=torch.float16) * torch.tensor([1.0, -1.0]).repeat(128)  # z = 1e5
    assert relative_norm(run(x, small).double().clamp(-6e4, 6e4), truth(x, small).clamp(-6e4, 6e4)) < 2e-3


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("activation", RUN)
def test_a_token_does_not_see_its_batch(activation, format):
    """Across every change of tiles. All sums are of integers, exact in whatever order NumPy takes them."""
    w = make(128, 70, 3, format, activation)
    exact = dataclasses.replace(
        w, lora_down=w.lora_down.sign(), lora_up=w.lora_up.sign(), smooth=torch.ones(128),
        wscales=torch.ones(w.wscales.shape).to(w.wscales.dtype), wtscale=None if w.wtscale is None else torch.ones(1))
    x = torch.randint(-127, 128, (65, 128)).float()
    x[:, 5] = 127
    y = run(x, exact)
    tiles = {configs.svdq_gemm_tile(x.device, m, torch.int8) for m in (1, 17, 65)}
    assert len(tiles) == 3
    for m in (1, 16, 17, 64):
        assert torch.equal(run(x[-m:], exact), y[-m:]), m


@pytest.mark.parametrize("path", vector_files("quant", "pack_*"), ids=lambda p: p.stem)
def test_published_layers(path):
    """The published code's quantized layers, in its own dtype of scales and factors."""
    v = Vectors(path)
    format = "nvfp4" if "nvfp4" in path.stem else "int4"
    n, k = v["codes"].shape
    lora_down, lora_up = v.get("lora_down_logical", torch.empty(0, k)), v.get("lora_up_logical", torch.empty(n, 0))
    smooth = v.get("smooth_logical", torch.ones(k))
    if "bfloat16" in path.stem:
        v = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in v.items()}
    wscales = v["wscales_logical"]
    if format == "nvfp4" and wscales.dtype != torch.float8_e4m3fn:
        wscales = wscales.float().to(torch.float8_e4m3fn)
    for activation in RUN:
        w = tk.quantize.SVDQWeight(tk.quantize.formats.pack_nibbles(v["codes"]), wscales, lora_down.float(),
                                   lora_up.float(), smooth.float(), k, format, activation,
                                   v["wtscale_logical"].float() if format == "nvfp4" else None)
        x, bias = torch.randn(4, k), v.get("bias_logical", torch.zeros(n)).float()
        assert_within_budget(run(x, w, bias), truth(x, w, bias), float32_reference(x, w, bias), factor=4)
