"""svdq_linear against float64, its integers bit for bit, the custom op's contract, and SVDQuantLinear."""

from __future__ import annotations

import os
import subprocess
import sys

import kernels
import pytest
import torch
from generators import poisoned, strided, with_outliers
from tolerance import assert_within_budget, relative_norm

import triskele as tk
from triskele import _native
from triskele.nn import SVDQuantLinear
from triskele.ops.svdq import reference
from triskele.quantize.formats import activation_codes, fake_quantize_activation, unpack_nibbles

SHAPES = [  # M, K, N, rank, group: ragged on every side
    (1, 16, 1, 0, 64), (5, 200, 48, 16, 64), (13, 64, 130, 7, 64), (37, 520, 65, 32, 64), (26, 48, 16, 3, 32),
    (64, 256, 96, 40, 128)]


def make(k, n, rank=4, format="int4", activation="int8", group=64, shift=0.0):
    """A weight with a smooth far from one; quantized without a search, so it is quick."""
    smooth = torch.rand(k) * 3 + 0.3
    return tk.quantize.svd_quantize(torch.randn(n, k) / k**0.5, rank=rank, format=format, activation=activation,
                                    group=group if format == "int4" else 64, smooth=smooth, iterations=1, shift=shift)


def float32_reference(x, w, bias):
    """The same quantized layer multiplied in float32: the error that any kernel of that precision has."""
    z = fake_quantize_activation(reference.smoothed(x, w.smooth, w.shift), w.activation, w.shift > 0, torch.float32)
    return z @ w.dequantize().float().T + (x.float() @ w.lora_down.T) @ w.lora_up.T + bias


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("m, k, n, rank, group", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_against_float64(m, k, n, rank, group, format, dtype):
    w = make(k, n, min(rank, n, k), format, group=group)
    x, bias = with_outliers(torch.randn(m, k), 100, 0.05).to(dtype), torch.randn(n)
    truth = tk.ops.svdq_linear(x.double(), w, bias, backend="reference")
    y = tk.ops.svdq_linear(x, w, bias, backend="cpu")
    assert y.dtype == dtype and y.shape == (m, n)
    assert_within_budget(y, truth, float32_reference(x, w, bias).to(dtype))
    assert torch.equal(y, tk.ops.svdq_linear(x, w, bias))  # auto picks it


def native_codes(x, w):
    """The kernel's activation codes [M, K] and token scales."""
    codes, scales, sums, _ = torch.ops.triskele_native.svdq_quantize(x, w.smooth, w.lora_down, w.shift, w.group)
    halves = codes.unflatten(1, (-1, 2, w.group // 2))
    assert torch.equal(sums, halves.sum((-1, -2), dtype=torch.int32))
    return halves.transpose(-1, -2).flatten(1)[:, :x.shape[1]], scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_equal_the_reference(dtype):
    w = make(200, 48, shift=0.171875)
    x = with_outliers(torch.randn(300, 200), 50).to(dtype)
    want, want_scales = activation_codes(reference.smoothed(x, w.smooth, w.shift), "int8", True)
    codes, scales = native_codes(x, w)
    assert torch.equal(codes.float(), want.squeeze(1)) and torch.equal(scales, want_scales.squeeze(1))


LEVELS_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_svdq import level_results
torch.save(level_results(), sys.argv[1])
"""


def level_results():
    """Integer sums by both formats (a float32 result that is exact: small integers, scales of one), and real layers."""
    out = {"level": torch.ops.triskele_native.cpu_level() if not _native.cpu_library() else None}
    for format in ("int4", "nvfp4"):
        torch.manual_seed(7)
        w = make(320, 70, 5, format)
        exact = tk.quantize.SVDQWeight(
            w.qweight, torch.ones_like(w.wscales), torch.zeros_like(w.lora_down), torch.zeros_like(w.lora_up),
            torch.ones(320), 320, format, "int8", None if format == "int4" else torch.ones(1))
        x = torch.randint(-127, 128, (19, 320)).float()
        x[:, 0] = 127  # the token's scale is one
        out[format, "exact"] = tk.ops.svdq_linear(x, exact)
        out[format, "codes"] = native_codes(torch.randn(19, 320), w)
        out[format, "real"] = tk.ops.svdq_linear(torch.randn(19, 320), w)
    return out


def test_every_instruction_set_gives_the_same_integers(tmp_path):
    assert not _native.cpu_library(), _native.cpu_library()
    levels = kernels.levels()
    running = [subprocess.Popen(
        [sys.executable, "-c", LEVELS_SCRIPT, tmp_path / f"{level}.pt", os.path.dirname(__file__)],
        env={**os.environ, "TRISKELE_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}) for level in levels]
    assert [process.wait() for process in running] == [0] * len(levels)
    results = [torch.load(tmp_path / f"{level}.pt") for level in levels]
    assert [result["level"] for result in results] == levels
    x = None
    for format in ("int4", "nvfp4"):
        torch.manual_seed(7)
        w = make(320, 70, 5, format)
        x = torch.randint(-127, 128, (19, 320)).float()
        x[:, 0] = 127
        values = unpack_nibbles(w.qweight, format).double() if format == "int4" else w.dequantize() / (
            w.scales.double() * w.wtscale.double()).repeat_interleave(16, 1)
        want = x.double() @ values.T
        for result in results:
            assert torch.equal(result[format, "exact"].double(), want.round(decimals=1)), result["level"]
            for mine, first in zip(result[format, "codes"], results[0][format, "codes"]):
                assert torch.equal(mine, first), result["level"]
            torch.testing.assert_close(result[format, "real"], results[0][format, "real"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation, bound", [("int8", 0.02), ("fp8", 0.05), ("int4", 0.4), ("nvfp4", 0.35),
                                               ("none", 1e-12)])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_reference_of_every_activation(activation, bound, format):
    """Only the activation's rounding stands between y and the effective weight's product."""
    w = make(136, 40, 8, format, activation)
    x, bias = torch.randn(3, 5, 136, dtype=torch.float64), torch.randn(40)
    y = tk.ops.svdq_linear(x, w, bias, backend="reference")
    assert y.shape == (3, 5, 40)
    assert relative_norm(y - bias, x @ w.effective_weight().T) < bound


def test_auto_stands_in_where_there_is_no_kernel():
    x = torch.randn(4, 64)
    for activation in ("int4", "fp8", "none"):
        w = make(64, 32, activation=activation)
        assert torch.equal(tk.ops.svdq_linear(x, w), tk.ops.svdq_linear(x, w, backend="reference"))
        with pytest.raises(NotImplementedError, match="backend='cpu' was asked for"):
            tk.ops.svdq_linear(x, w, backend="cpu")
    with pytest.raises(NotImplementedError, match=r"got torch\.float64"):
        tk.ops.svdq_linear(x.double(), make(64, 32))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_leading_dimensions_strides_and_margins(backend):
    w, bias = make(96, 33), torch.randn(33)
    x = torch.randn(2, 3, 4, 96)
    y = tk.ops.svdq_linear(x, w, bias, backend=backend)
    assert y.shape == (2, 3, 4, 33)
    assert torch.equal(y, tk.ops.svdq_linear(strided(x), w, bias, backend=backend))
    assert torch.equal(y, tk.ops.svdq_linear(poisoned(x), w, bias, backend=backend))
    assert torch.equal(y.mT, tk.ops.svdq_linear(x.transpose(1, 2), w, bias, backend=backend).transpose(1, 2).mT)
    assert tk.ops.svdq_linear(x[0, 0, 0], w, backend=backend).shape == (33,)
    for empty in (x[:0], x[:, :, :0]):
        assert tk.ops.svdq_linear(empty, w, backend=backend).shape == (*empty.shape[:-1], 33)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_and_non_finite_tokens(backend):
    w, bias = make(96, 33), torch.randn(33)
    x = torch.randn(6, 96)
    clean = tk.ops.svdq_linear(x, w, bias, backend=backend)
    x[1], x[2, 5], x[3, 9], x[4] = 0, float("nan"), float("inf"), 1e-35
    y = tk.ops.svdq_linear(x, w, bias, backend=backend)
    assert torch.equal(y[1], bias) and torch.allclose(y[4], bias)
    assert bool(y[2].isnan().all()) and bool(y[3].isnan().all())
    assert torch.equal(y[[0, 5]], clean[[0, 5]])  # its neighbours do not see it


def test_large_values_do_not_overflow():
    w = make(3072, 64, 16)
    for scale in (100.0, 1e30):
        x = torch.full((2, 3072), scale)
        y = tk.ops.svdq_linear(x, w)
        assert relative_norm(y, tk.ops.svdq_linear(x.double(), w, backend="reference")) < 1e-5


def test_same_bits_for_any_threads_and_any_batch():
    w, bias = make(520, 200, 20), torch.randn(200)
    x = torch.randn(61, 520)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tk.ops.svdq_linear(x, w, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)
    for rows in (1, 2, 3, 7, 12, 13, 50):
        assert torch.equal(tk.ops.svdq_linear(x[-rows:], w, bias), results[0][-rows:]), rows


@pytest.mark.parametrize("m, k, n, group", [(150, 3400, 300, 64), (1100, 192, 80, 64), (40, 6700, 70, 128)])
def test_blocking_leaves_no_trace(m, k, n, group):
    """Beyond every block of the kernels: a few tokens of a batch, which take the plainest path, have the same bits."""
    w, x = make(k, n, 4, group=group), torch.randn(m, k)
    y = tk.ops.svdq_linear(x, w)
    assert relative_norm(y, tk.ops.svdq_linear(x.double(), w, backend="reference")) < 1e-5
    for at in range(0, m, max(1, m // 40)):
        assert torch.equal(tk.ops.svdq_linear(x[at:at + 3], w), y[at:at + 3]), at


@pytest.mark.parametrize("activation", ["int8", "int4"])
def test_gradients(activation):
    w, bias = make(72, 24, 6, activation=activation), torch.randn(24, requires_grad=True)
    x = torch.randn(2, 5, 72, requires_grad=True)
    grad = torch.randn(2, 5, 24)
    tk.ops.svdq_linear(x, w, bias).backward(grad)
    want = grad.double() @ w.effective_weight()
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    # with activations as they are the op is linear in x: finite differences see the same gradient
    v = make(24, 8, 3, activation="none")
    assert torch.autograd.gradcheck(lambda a: tk.ops.svdq_linear(a, v, backend="reference"),
                                    torch.randn(3, 24, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("format, activation, epilogue, backend", [
    ("int4", "int8", "none", "cpu"), ("nvfp4", "int8", "gelu", "auto"), ("int4", "int4", "gelu_tanh", "reference")])
def test_opcheck(format, activation, epilogue, backend):
    w = make(48, 20, 4, format, activation)
    x = torch.randn(2, 3, 48, requires_grad=True)
    wscales = w.wscales.bfloat16()  # opcheck itself compares tensors in ways that float8 does not have
    arguments = (x, w.qweight, wscales, w.wtscale, w.lora_down, w.lora_up, w.smooth, torch.randn(20), format,
                 activation, 0.0, epilogue, backend)
    torch.library.opcheck(torch.ops.triskele.svdq_linear, arguments)
    torch.library.opcheck(torch.ops.triskele.svdq_linear_backward,
                          (torch.randn(2, 3, 20), *arguments[1:7], format))


def test_fullgraph_compile():
    module = SVDQuantLinear.from_quantized(make(48, 20), torch.randn(20))
    w = make(48, 20)
    for f in (module, lambda a: tk.ops.svdq_linear(a, w), lambda a: tk.ops.svdq_linear(a, w, epilogue="gelu")):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        x, other = (torch.randn(2, 3, 48, requires_grad=True) for _ in range(2))
        other.data.copy_(x.data)
        compiled(x).square().sum().backward()
        f(other).square().sum().backward()
        assert torch.equal(compiled(x), f(x)) and torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("arguments, message", [
    ({"x": torch.ones(2, 65)}, r"x: expected shape \[\.\.\., 64\]"), ({"x": torch.tensor(1.0)}, "x: expected shape"),
    ({"x": torch.ones(2, 64, dtype=torch.int32)}, "x: expected a floating-point dtype"),
    ({"x": [1.0]}, "x: expected a tensor"), ({"weight": torch.ones(32, 64)}, "weight: expected an SVDQWeight"),
    ({"bias": torch.ones(31)}, "bias: expected shape"), ({"bias": 1.0}, "bias: expected a tensor"),
    ({"backend": "fast"}, "backend: expected one of"), ({"epilogue": "relu"}, "epilogue: expected one of"),
    ({"x": torch.ones(2, 64, device="meta")}, "weight: expected the device of x")])
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        tk.ops.svdq_linear(**{"x": torch.ones(2, 64), "weight": make(64, 32), **arguments})


def test_native_ops_check_what_they_are_given():
    assert not _native.cpu_library()
    native, x = torch.ops.triskele_native, torch.randn(4, 64)
    with pytest.raises(RuntimeError, match="smooth size: expected 64, got 63"):
        native.svdq_quantize(x, torch.ones(63), torch.ones(16, 64), 0.0, 64)
    with pytest.raises(RuntimeError, match="x in float32 or bfloat16"):
        native.svdq_quantize(x.double(), torch.ones(64), torch.ones(16, 64), 0.0, 64)
    with pytest.raises(RuntimeError, match="lora_down in float32 or bfloat16"):
        native.svdq_quantize(x, torch.ones(64), torch.ones(16, 64).half(), 0.0, 64)
    with pytest.raises(RuntimeError, match="group to be a multiple of 16"):
        native.svdq_quantize(x, torch.ones(64), torch.ones(16, 64), 0.0, 0)
    parts = native.svdq_quantize(x, torch.ones(64), torch.ones(16, 64), 0.0, 64)
    with pytest.raises(RuntimeError, match="qweight columns: expected 32, got 31"):
        native.svdq_gemm(*parts, torch.zeros(8, 31, dtype=torch.uint8), torch.ones(8, 1), torch.ones(16, 8), None,
                         False, False, 0)
    with pytest.raises(RuntimeError, match="rounded up to 16: expected 16, got 32"):
        native.svdq_gemm(*parts, torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), torch.ones(8, 17), None,
                         False, False, 0)
    with pytest.raises(RuntimeError, match="epilogue to be 0"):
        native.svdq_gemm(*parts, torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), torch.ones(8, 16), None,
                         False, False, 3)


# ---- the module ----

CONFIGS = [tk.SVDQuant(rank=8), tk.SVDQuant(rank=8, format="nvfp4"), tk.SVDQuant(rank=0, activation="none"),
           tk.SVDQuant(rank=500, activation="int4")]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_module_from_linear_and_back_from_its_state(config, bias):
    linear, x = torch.nn.Linear(136, 72, bias=bias), torch.randn(4, 6, 136)
    module = SVDQuantLinear.from_linear(linear, x, config)
    assert isinstance(module, torch.nn.Linear) and not any(p is linear.bias for p in module.parameters())
    y = module(x)
    assert relative_norm(y, linear(x)) < (0.2 if config.activation == "int4" else 0.12)
    assert relative_norm(x @ module.weight.T + (module.bias if bias else 0), linear(x)) < 0.12
    fresh = SVDQuantLinear(136, 72, bias=bias, config=config, device="meta")
    assert {k: (v.shape, v.dtype) for k, v in fresh.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in module.state_dict().items()}
    assert fresh(x.to("meta")).shape == y.shape and fresh.weight.shape == (72, 136)
    fresh.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(fresh(x), y)
    real = SVDQuantLinear(136, 72, bias=bias, config=config)
    assert not bool(real(x).any())  # the zero map until it is loaded
    real.load_state_dict(module.state_dict())
    assert torch.equal(real(x), y)
    weight, own = module.to_quantized()
    assert torch.equal(tk.ops.svdq_linear(x, weight, own), y)
    assert torch.equal(SVDQuantLinear.from_linear(linear, x, config)(x), y)  # deterministic


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_module_casts_leave_the_constants_alone(format):
    linear = torch.nn.Linear(128, 64)
    module = SVDQuantLinear.from_linear(linear, config=tk.SVDQuant(rank=8, format=format))
    state, x = {k: v.clone() for k, v in module.state_dict().items()}, torch.randn(3, 128)
    y = module(x)
    for cast in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32):
        module.to(cast)
        assert module.bias.dtype == cast and module.weight.dtype == cast
        for name in ("qweight", "wscales", "lora_down", "lora_up", "smooth"):
            assert module.state_dict()[name].dtype == state[name].dtype and torch.equal(
                getattr(module, name), state[name]), name
    module.bias.data.copy_(state["bias"])
    assert torch.equal(module(x), y)
    assert module.half()(x.half()).dtype == torch.float16
    assert module.to("meta").qweight.is_meta
    # a loader that casts every floating tensor to bfloat16 does no harm either
    other = SVDQuantLinear(128, 64, config=tk.SVDQuant(rank=8, format=format))
    other.load_state_dict({k: v if k in ("qweight", "bias") else v.to(torch.bfloat16) for k, v in state.items()})
    assert torch.equal(other(x), y)


def test_module_memory():
    """The big layers of a transformer: at most 0.29 of bfloat16, activation and bias aside."""
    for k, n in ((3072, 3072), (3072, 12288), (12288, 3072)):
        for format in ("int4", "nvfp4"):
            module = SVDQuantLinear(k, n, config=tk.SVDQuant(format=format), device="meta")
            limit = 0.29 if format == "int4" else 0.305  # nvfp4 has four times the scales, of half the size
            assert module.memory_bytes() <= limit * 2 * k * n, (k, n, format)


def test_module_with_shift():
    x, linear = torch.nn.functional.gelu(torch.randn(30, 128)), torch.nn.Linear(128, 64)
    for bias in (linear.bias, None):
        weight = tk.quantize.svd_quantize(linear.weight, x, rank=8, activation="int4", shift=tk.quantize.GELU_SHIFT)
        module = SVDQuantLinear.from_quantized(weight, bias)
        want = tk.ops.svdq_linear(x, weight, bias)
        torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
        again, own = module.to_quantized()
        torch.testing.assert_close(tk.ops.svdq_linear(x, again, own), want, rtol=1e-5, atol=1e-5)
        assert "shift=0.171875" in repr(module)


def test_module_trains_what_is_before_it_and_its_bias():
    before, module = torch.nn.Linear(64, 64), SVDQuantLinear.from_linear(torch.nn.Linear(64, 32))
    module(before(torch.randn(5, 64))).square().sum().backward()
    assert float(before.weight.grad.abs().max()) > 0 and float(module.bias.grad.abs().max()) > 0
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_module_refuses_bad_states_and_arguments():
    module = SVDQuantLinear.from_linear(torch.nn.Linear(64, 32), config=tk.SVDQuant(rank=4))
    good, x = module.state_dict(), torch.randn(2, 64)
    y = module(x)
    for name, value, message in (
            ("wscales", good["wscales"] * float("nan"), "wscales: expected finite"),
            ("smooth", good["smooth"] * 0, "smooth: expected positive"),
            ("wscales", good["wscales"][:3], "size mismatch for wscales"),
            ("qweight", good["qweight"].to(torch.int8), "qweight: expected dtype torch.uint8"),
            ("lora_up", good["lora_up"].int(), "lora_up: expected a floating-point dtype"),
            ("qweight", torch.empty(2**20, 2**20, dtype=torch.uint8, device="meta"), "size mismatch for qweight")):
        with pytest.raises(RuntimeError, match=message):
            SVDQuantLinear(64, 32, config=tk.SVDQuant(rank=4)).load_state_dict({**good, name: value})
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({k: v for k, v in good.items() if k != "smooth"})
    assert torch.equal(module(x), y)
    for make_one, message in (
            (lambda: SVDQuantLinear(0, 4), "in_features: expected"), (lambda: SVDQuantLinear(4, 0), "out_features"),
            (lambda: SVDQuantLinear.from_linear(torch.nn.Conv1d(4, 4, 1)), "linear: expected an nn.Linear"),
            (lambda: SVDQuantLinear.from_linear(torch.nn.Linear(4, 4, device="meta")), "linear: expected a weight"),
            (lambda: SVDQuantLinear.from_quantized(torch.ones(4, 4)), "weight: expected an SVDQWeight"),
            (lambda: SVDQuantLinear.from_quantized(make(64, 32), torch.ones(3)), "bias: expected shape"),
            (lambda: module(torch.ones(2, 63)), r"input: expected shape \[\.\.\., 64\]")):
        with pytest.raises(ValueError, match=message):
            make_one()
    with pytest.raises((AttributeError, KeyError)):
        module.weight = torch.nn.Parameter(torch.ones(32, 64))
    with pytest.raises(RuntimeError, match="nothing can be merged into a 4-bit weight"):
        module.weight.data += 1  # as peft's fuse_lora does: without the error the adapter would be lost
    assert type(module.weight * 2) is torch.Tensor
