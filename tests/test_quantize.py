"""svd_quantize and its parts: the published numerics, shapes of all kinds, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import Vectors, vector_files
from generators import strided, with_outliers
from tolerance import relative_norm

import triskele as tk
from triskele import quantize
from triskele.quantize.formats import E2M1, e2m1_codes, e2m1_values, pack_nibbles, unpack_nibbles

NUMERICS = vector_files("quant", "svdquant_*")


@pytest.fixture(scope="module", params=NUMERICS, ids=lambda p: p.stem)
def published(request):
    """(vectors, metadata, our SVDQWeight) of one numerics file."""
    v = Vectors(request.param)
    m = v.metadata
    ours = tk.quantize.svd_quantize(
        v["weight"], v["x"], rank=int(m["rank"]), format=m["format"], activation=m["format"],
        iterations=int(m["low_rank_max_iters"]), early_stop=m["early_stop"] == "True", svd="exact")
    return v, m, ours


def values(codes, format):
    return e2m1_values(codes, torch.float64) if format == "nvfp4" else codes.double()


def test_smoothing_search(published):
    v, m, ours = published
    search = ours.report.smooth
    torch.testing.assert_close(search.alpha_beta, v["alpha_beta"], rtol=0, atol=1e-12)
    assert search.index == int(m["smooth_best_index"])
    torch.testing.assert_close(ours.smooth, v["smooth"], rtol=1e-6, atol=0)
    torch.testing.assert_close(search.errors, v["smooth_search_error"], rtol=5e-4, atol=0)


def test_smoothing_search_without_low_rank(published):
    v, m, _ = published
    search = quantize.search_smooth(v["weight"].double(), v["x"].double(), 0, format=m["format"],
                                    activation=m["format"])
    assert search.index == int(m["smooth_best_index_no_lowrank"])
    torch.testing.assert_close(search.smooth, v["smooth_no_lowrank"], rtol=1e-6, atol=0)
    torch.testing.assert_close(search.errors, v["smooth_search_error_no_lowrank"], rtol=5e-4, atol=0)


def test_low_rank_history(published):
    v, m, ours = published
    torch.testing.assert_close(ours.report.low_rank_errors, v["lowrank_error_history"], rtol=1e-5, atol=0)
    assert ours.report.low_rank_best == int(m["low_rank_best_iter"])
    plain = tk.quantize.svd_quantize(
        v["weight"], v["x"], rank=int(m["rank"]), format=m["format"], activation=m["format"], smooth=None,
        iterations=int(m["low_rank_max_iters"]), early_stop=m["early_stop"] == "True")
    torch.testing.assert_close(plain.report.low_rank_errors, v["lowrank_error_history_nosmooth"], rtol=1e-5, atol=0)
    assert plain.report.low_rank_best == int(m["low_rank_best_iter_nosmooth"])


def test_low_rank_product_and_codes(published):
    v, m, ours = published
    product = ours.lora_up.double() @ (ours.lora_down * ours.smooth).double()
    assert relative_norm(product, v["lora_up"].double() @ v["lora_down"].double()) < 1e-4
    want = v["residual_codes"].double() / (2 if m["format"] == "nvfp4" else 1)
    assert float((values(ours.codes, m["format"]) != want).double().mean()) <= 5e-4
    torch.testing.assert_close(ours.scales, v["residual_scales"], rtol=1e-3, atol=0)
    if m["format"] == "nvfp4":
        torch.testing.assert_close(ours.tensor_scale, v["residual_tensor_scale"], rtol=1e-4, atol=0)


def test_activation_codes(published):
    v, m, _ = published
    codes, scales = quantize.formats.activation_codes(v["x"] / v["smooth"], m["format"])
    want = v["x_smoothed_codes"].double() / (2 if m["format"] == "nvfp4" else 1)
    assert float((codes.flatten(-2).double() != want).double().mean()) <= 5e-4
    torch.testing.assert_close(scales, v["x_smoothed_scales"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["rtn", "smooth_only", "lowrank_only_iter1", "lowrank_only", "smooth_lowrank_iter1",
                                  "smooth_lowrank", "weight_only_rtn", "act_only_rtn"])
def test_output_errors(published, case):
    """Each row of the README's table, through svdq_linear's reference."""
    v, m, ours = published
    want = json.loads(m["relative_output_errors"])[case]
    y = v["x"].double() @ v["weight"].double().T
    if case == "act_only_rtn":
        z = quantize.fake_quantize_activation(v["x"], m["format"])
        assert relative_norm(z @ v["weight"].double().T, y) == pytest.approx(want, rel=1e-3)
        return
    options = {"rank": int(m["rank"]) if "lowrank" in case else 0, "format": m["format"], "smooth": None,
               "activation": "none" if case == "weight_only_rtn" else m["format"],
               "early_stop": m["early_stop"] == "True",
               "iterations": 1 if "iter1" in case else int(m["low_rank_max_iters"])}
    if "smooth" in case:
        options["smooth"] = v["smooth_no_lowrank"] if case == "smooth_only" else v["smooth"]
    w = ours if case == "smooth_lowrank" else tk.quantize.svd_quantize(v["weight"], v["x"], **options)
    got = tk.ops.svdq_linear(v["x"].double(), w, backend="reference")
    assert relative_norm(got, y) == pytest.approx(want, rel=1e-3)
    assert w.report.relative_error == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("n, k", [(48, 48), (64, 200), (16, 1), (130, 72), (1, 64)])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_any_shape(n, k, format):
    weight = torch.randn(n, k)
    rank = min(4, n, k)
    w = tk.quantize.svd_quantize(weight, rank=rank, format=format)
    assert w.shape == (n, k) and w.codes.shape == (n, k) and w.rank == rank
    assert w.dequantize().shape == (n, k) and w.dequantize().dtype == torch.float64
    steps = quantize.formats.dequantize(torch.full((n, k), 7 if format == "nvfp4" else 1), w.scales, w.tensor_scale,
                                        format, w.group)  # the step of int4, the range of nvfp4
    error = (w.effective_weight() - weight.double()).abs()
    assert bool((error <= steps * (0.5 if format == "int4" else 1 / 5) * 1.001).all())


def test_rank_zero_is_rounding_to_nearest():
    weight = torch.randn(32, 128)
    w = tk.quantize.svd_quantize(weight, rank=0)
    scales = weight.unflatten(1, (2, 64)).abs().amax(-1) / 7
    assert torch.equal(w.scales, scales)
    assert torch.equal(w.codes, (weight / scales.repeat_interleave(64, 1)).round().to(torch.int8))
    assert w.lora_down.shape == (0, 128) and w.lora_up.shape == (32, 0)


def test_low_rank_takes_the_outliers():
    weight = torch.randn(96, 128) * 0.02 + 5 * torch.randn(96, 4) @ torch.randn(4, 128)
    error = [relative_norm(tk.quantize.svd_quantize(weight, rank=r).effective_weight(), weight) for r in (0, 4)]
    assert error[1] < error[0] / 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_dtype_costs_nothing(dtype):
    """Scales, smooth and factors are rounded before the residual is taken, so it makes up for their rounding."""
    weight, x = torch.randn(128, 128), with_outliers(torch.randn(64, 128), 30)
    narrow = tk.quantize.svd_quantize(weight, x, rank=16, dtype=dtype)
    wide = tk.quantize.svd_quantize(weight, x, rank=16)
    assert {t.dtype for t in (narrow.wscales, narrow.lora_down, narrow.lora_up, narrow.smooth)} == {dtype}
    assert narrow.report.relative_error < 1.03 * wide.report.relative_error
    assert tk.quantize.svd_quantize(weight.to(dtype), rank=4).wscales.dtype == dtype


def test_randomized_svd_is_seeded_and_close():
    weight = torch.randn(300, 20) @ torch.randn(20, 280) + 0.3 * torch.randn(300, 280)
    options = {"rank": 24, "iterations": 3}
    exact = tk.quantize.svd_quantize(weight, svd="exact", **options)
    first = tk.quantize.svd_quantize(weight, svd="randomized", **options)
    torch.rand(7)  # the global generator must not matter
    again = tk.quantize.svd_quantize(weight, svd="randomized", **options)
    assert torch.equal(first.qweight, again.qweight) and torch.equal(first.lora_up, again.lora_up)
    assert first.report.relative_error < 1.02 * exact.report.relative_error


def test_unsigned_activations_after_gelu():
    weight, x = torch.randn(64, 128), torch.nn.functional.gelu(torch.randn(96, 128) * 2)
    signed = tk.quantize.svd_quantize(weight, x, rank=8, activation="int4")
    shifted = tk.quantize.svd_quantize(weight, x, rank=8, activation="int4", shift=tk.quantize.GELU_SHIFT)
    bias, y = torch.randn(64), x.double() @ weight.double().T
    error = [relative_norm(tk.ops.svdq_linear(x.double(), w, bias, backend="reference") - bias, y)
             for w in (signed, shifted)]
    assert error[1] < 0.85 * error[0]
    assert error[1] == pytest.approx(shifted.report.relative_error, rel=1e-5)
    with pytest.raises(ValueError, match="activations: expected values >= -shift"):
        tk.quantize.svd_quantize(weight, x - 1, rank=8, shift=tk.quantize.GELU_SHIFT)


def test_shared_input():
    x, weights = torch.randn(40, 64), [torch.randn(n, 64) for n in (32, 48, 16)]
    for format in ("int4", "nvfp4"):
        parts = tk.quantize.svd_quantize_shared(weights, x, rank=8, format=format)
        whole = tk.quantize.svd_quantize(torch.cat(weights), x, rank=8, format=format)
        together = torch.cat([tk.ops.svdq_linear(x, p, backend="reference") for p in parts], 1)
        assert torch.equal(together, tk.ops.svdq_linear(x, whole, backend="reference"))
        assert all(p.lora_down.data_ptr() == parts[0].lora_down.data_ptr() for p in parts)
    with pytest.raises(ValueError, match=r"weights\[1\]: expected shape"):
        tk.quantize.svd_quantize_shared([torch.ones(4, 64), torch.ones(4, 32)])
    with pytest.raises(ValueError, match="weights: expected at least one"):
        tk.quantize.svd_quantize_shared([])
    with pytest.raises(ValueError, match="sizes: expected sizes that add up to 96"):
        whole.split([32, 48])


def test_dead_channels_and_zero_weights():
    x, weight = torch.randn(32, 64), torch.randn(48, 64)
    x[:, 3], weight[:, 5], weight[7] = 0, 0, 0
    w = tk.quantize.svd_quantize(weight, x, rank=4)
    assert w.smooth[3] == 1 and w.smooth[5] == 1
    for format in ("int4", "nvfp4"):
        zero = tk.quantize.svd_quantize(torch.zeros(16, 64), rank=2, format=format)
        assert float(zero.effective_weight().abs().max()) == 0 and bool(torch.isfinite(zero.scales).all())


def test_inputs_are_left_alone_and_strides_do_not_matter():
    weight, x = torch.randn(32, 64), torch.randn(2, 9, 64)
    plain = tk.quantize.svd_quantize(weight, x, rank=4)
    before = weight.clone()
    other = tk.quantize.svd_quantize(strided(weight), strided(x), rank=4)
    assert torch.equal(weight, before)
    assert torch.equal(plain.qweight, other.qweight) and torch.equal(plain.lora_down, other.lora_down)


def test_e2m1_rounding():
    table = torch.tensor(E2M1)
    assert torch.equal(e2m1_values(e2m1_codes(table), torch.float32), table)
    ties = torch.tensor([0.25, -0.25, 2.5, -2.5, 5.0, -5.0, 9.0, -9.0])  # upwards, beyond the end clamped
    assert e2m1_values(e2m1_codes(ties), torch.float32).tolist() == [0.5, 0.0, 3.0, -2.0, 6.0, -4.0, 6.0, -6.0]
    assert 8 not in e2m1_codes(torch.linspace(-7, 7, 999)).tolist()


def test_nibbles_round_trip():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), "int4"), codes)
    assert pack_nibbles(torch.tensor([[1, -1]])).item() == 0xF1
    unsigned = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    assert torch.equal(unpack_nibbles(pack_nibbles(unsigned), "nvfp4"), unsigned)


def test_activation_quantizer_edges():
    z = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5], [1e-35, 0, 0], [float("nan"), 1, 1], [float("inf"), 1, 1]])
    for activation in ("int8", "int4", "fp8", "nvfp4"):
        out = quantize.fake_quantize_activation(z, activation)
        assert out[0].tolist() == [0, 0, 0] and out[2].tolist() == [0, 0, 0]
        assert bool(out[3:].isnan().all())
        assert relative_norm(out[1], z[1]) < 0.2
    assert quantize.fake_quantize_activation(z, "int8")[1, 1] == pytest.approx(-2, rel=1e-6)


BAD = {
    "rank: expected an integer in": {"rank": 17},
    "rank: expected an integer in .*got -1": {"rank": -1},
    "format: expected one of": {"format": "int3"},
    "activation: expected one of": {"activation": "int2"},
    "group: expected a multiple of 16": {"group": 40},
    "group with format='nvfp4': expected 16": {"group": 32, "format": "nvfp4"},
    "iterations: expected an integer": {"iterations": 0},
    "svd: expected one of": {"svd": "fast"},
    "smooth: expected shape": {"smooth": torch.ones(3)},
    "smooth: expected positive": {"smooth": torch.zeros(64)},
    "smooth: expected finite": {"smooth": torch.full((64,), float("nan"))},
    "smooth: expected 'search'": {"smooth": "yes"},
    "dtype: expected one of": {"dtype": torch.int8},
    "weight: expected finite values": {"weight": torch.full((16, 64), float("inf"))},
    "weight: expected 2 dimensions": {"weight": torch.ones(4)},
    "weight: expected a floating-point dtype": {"weight": torch.ones(16, 64, dtype=torch.int32)},
    "weight: expected at least one row": {"weight": torch.ones(0, 64)},
    "weight: expected a tensor": {"weight": [1.0]},
    "weight: expected values whose group scales are finite": {"weight": torch.full((16, 64), 6e5),
                                                              "dtype": torch.float16, "rank": 0},
    "weight: expected a tensor with data": {"weight": torch.ones(16, 64, device="meta")},
    "activations: expected shape": {"activations": torch.ones(5, 63)},
    r"activations: expected shape .*got \[\]": {"activations": torch.tensor(1.0)},
    r"activations: expected shape .*got \[0, 0\]": {"activations": torch.ones(0, 0)},
    "activations: expected at least one token": {"activations": torch.ones(0, 64)},
    "activations: expected finite": {"activations": torch.full((2, 64), float("nan"))},
    "shift: expected a finite number": {"shift": -1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = {"weight": torch.randn(16, 64), "rank": 2, **BAD[message]}
    with pytest.raises(ValueError, match=message):
        tk.quantize.svd_quantize(**arguments)


def test_hostile_weights_are_refused():
    good = tk.quantize.svd_quantize(torch.randn(16, 64), rank=2)
    fields = {name: getattr(good, name) for name in ("qweight", "wscales", "lora_down", "lora_up", "smooth")}
    nan = torch.full_like(good.wscales, float("nan"))
    for name, value, message in (
            ("qweight", good.qweight[:, :16], "qweight: expected shape"),
            ("qweight", good.qweight.to(torch.int8), "qweight: expected dtype"),
            ("wscales", good.wscales[:3], "wscales: expected shape"), ("wscales", nan, "wscales: expected finite"),
            ("lora_down", good.lora_down[:, :9], "lora_down: expected shape"),
            ("lora_up", good.lora_up[:, :1], "lora_up: expected shape"),
            ("smooth", good.smooth[:5], "smooth: expected shape"),
            ("smooth", -good.smooth, "smooth: expected positive"),
            ("smooth", good.smooth.to("meta"), "smooth: expected the device of qweight"),
            ("smooth", None, "smooth: expected a tensor")):
        with pytest.raises(ValueError, match=message):
            quantize.SVDQWeight(**{**fields, name: value}, in_features=64)
    with pytest.raises(ValueError, match="wtscale: expected a tensor with nvfp4"):
        quantize.SVDQWeight(**fields, in_features=64, wtscale=torch.ones(1))
    with pytest.raises(ValueError, match="qweight: expected shape"):
        quantize.SVDQWeight(**fields, in_features=2**40)


def test_weights_of_any_floating_dtype():
    torch.manual_seed(0)
    weight = torch.randn(24, 64).to(torch.float8_e4m3fn)
    quantized = tk.quantize.svd_quantize(weight, rank=4)
    assert quantized.lora_up.dtype == torch.float32
    assert relative_norm(quantized.effective_weight(), weight.double()) < 0.1
