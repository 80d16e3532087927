"""The linear's epilogue: GELU in float32 before y is rounded, on every path of the kernels; its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from test_svdq_fast import make
from tolerance import assert_within_budget

import triskele as tk
from triskele.ops.svdq import reference
from triskele.quantize.formats import fake_quantize_activation

GELU = ("gelu", "gelu_tanh")


def exact(x, epilogue):
    """float64, without the cancellation that torch's own formulas have where y is tiny."""
    x = x.double()
    if epilogue == "gelu":
        tail = 0.5 * torch.special.erfcx(x.abs() / math.sqrt(2)) * torch.exp(-x * x / 2)
        return x * torch.where(x < 0, tail, 1 - tail)
    e = torch.exp(-2 * math.sqrt(2 / math.pi) * (x.abs() + 0.044715 * x.abs() ** 3))
    return x * torch.where(x < 0, e, 1.0) / (1 + e)


def through_the_bias(values, m, epilogue):
    """act(values) by the kernel: a weight of zeros leaves the bias alone."""
    n = values.numel()
    zero = tk.quantize.SVDQWeight(torch.zeros(n, 32, dtype=torch.uint8), torch.ones(n, 1), torch.zeros(0, 64),
                                  torch.zeros(n, 0), torch.ones(64), 64)
    return tk.ops.svdq_linear(torch.ones(m, 64), zero, values, "cpu", epilogue=epilogue)[-1]


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("epilogue", GELU)
def test_error_in_units_of_the_last_place(epilogue, m):
    """Of y itself, down to the smallest normal float."""
    x = torch.cat([torch.linspace(-15, 15, 30001), torch.randn(4000) * 1e-3, torch.logspace(-37, 37, 800),
                   -torch.logspace(-37, 37, 800)])
    want = exact(x, epilogue)
    ulp = torch.finfo(torch.float32).eps * want.abs().clamp(min=torch.finfo(torch.float32).tiny)
    error = (through_the_bias(x, m, epilogue).double() - want).abs() / ulp
    assert float(error.max()) < 4, float(x[error.argmax()])


@pytest.mark.parametrize("epilogue", GELU)
def test_limits(epilogue):
    inf = float("inf")
    y = through_the_bias(torch.tensor([0.0, 3e38, -3e38, 20.0, -20.0, inf, float("nan"), -inf]), 6, epilogue)
    assert y[:6].tolist() == [0.0, torch.tensor(3e38).item(), 0.0, 20.0, 0.0, inf]
    assert bool(y[6:].isnan().all())  # of -infinity too, as torch's


@pytest.mark.parametrize("epilogue", GELU)
@pytest.mark.parametrize("format, group, scales", [("int4", 64, torch.bfloat16), ("int4", 64, torch.float32),
                                                   ("int4", 32, torch.bfloat16), ("nvfp4", 16, torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_definition_on_every_path(dtype, format, group, scales, epilogue):
    """Integer and float sums, tiles and vectors: by the format and by M."""
    torch.manual_seed(5)
    w, bias = make(320, 70, group=group, scales=scales, format=format), torch.randn(70)
    x = torch.randn(130, 320).to(dtype)
    y = tk.ops.svdq_linear(x, w, bias, backend="cpu", epilogue=epilogue)
    want = tk.ops.svdq_linear(x.double(), w, bias, backend="reference", epilogue=epilogue)
    z = fake_quantize_activation(reference.smoothed(x, w.smooth, 0.0), "int8", False, torch.float32)
    rough = z @ w.dequantize().float().T + (x.float() @ w.lora_down.float().T) @ w.lora_up.float().T + bias
    assert y.dtype == dtype
    assert_within_budget(y, want, reference.activated(rough, epilogue).to(dtype))
    for m in (1, 2, 5, 6, 17, 33):  # every path, the same bits
        assert torch.equal(tk.ops.svdq_linear(x[:m], w, bias, backend="cpu", epilogue=epilogue), y[:m]), m
    if dtype == torch.float32:  # nothing but GELU differs
        plain = tk.ops.svdq_linear(x, w, bias, backend="cpu")
        torch.testing.assert_close(y.double(), exact(plain, epilogue), rtol=5e-7, atol=1e-37)


@pytest.mark.parametrize("epilogue", GELU)
@pytest.mark.parametrize("dtype, with_bias", [(torch.float32, True), (torch.bfloat16, False)])
def test_gradients_are_those_of_the_composition(dtype, with_bias, epilogue):
    w, grad = make(72, 24), torch.randn(2, 5, 24).to(dtype)
    x, bias = torch.randn(2, 5, 72).to(dtype), torch.randn(24) if with_bias else None
    found = []
    for fused in (True, False):
        mine, own = x.clone().requires_grad_(), bias.clone().requires_grad_() if with_bias else None
        if fused:
            y = tk.ops.svdq_linear(mine, w, own, epilogue=epilogue)
        else:
            y = reference.activated(tk.ops.svdq_linear(mine, w, own), epilogue)
        y.backward(grad)
        found.append((mine.grad, own.grad if with_bias else torch.zeros(1)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert float(found[0][0].abs().max()) > 0
