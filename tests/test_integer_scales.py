"""scales="integer": multiples 1 … 18 of one scale a channel, of small error and no lost gain, exact as stored."""

from __future__ import annotations

import pytest
import torch
from generators import with_outliers
from tolerance import relative_norm

import triskele as tk
from triskele.nn import SVDQuantLinear
from triskele.quantize.formats import quantize_weight
from triskele.quantize.scales import are_integer

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def multiples(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(t [N], q [N, G]) in float64: t the largest m 2^e, m in 4 … 7, of which all scales are multiples 1 … 18."""
    scales = scales.double()
    t = torch.full((len(scales),), float("nan"), dtype=torch.float64)
    for row, values in enumerate(scales):
        exponent = int(values.min().log2().floor())
        for candidate in sorted(m * 2.0**e for m in (4, 5, 6, 7) for e in range(exponent - 7, exponent - 1)):
            q = values / candidate
            if bool((q == q.round()).all()) and float(q.max()) <= 18:
                t[row] = candidate
    return t, scales / t[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, group", [(33, 200, 64), (16, 48, 16), (5, 130, 128), (1, 1, 64), (96, 96, 32)])
def test_code_times_multiple_is_a_byte(n, k, group, dtype):
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator) * torch.randn(k, generator=generator).exp() * 0.02
    w = tk.quantize.svd_quantize(weight, rank=0, group=group, dtype=dtype, scales="integer")
    assert w.has_integer_scales() and w.wscales.dtype == dtype
    t, q = multiples(w.scales)
    assert bool(torch.isfinite(t).all()) and float(q.min()) >= 1
    byte = w.codes.double() * q.repeat_interleave(group, 1)[:, :k]
    assert float(byte.abs().max()) <= 126
    assert torch.equal(byte * t[:, None], w.dequantize())


@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_multiple_is_taken(weighted):
    """Against a search in plain loops, in float64."""
    generator = torch.Generator().manual_seed(3)
    r = torch.randn(6, 64, generator=generator) * torch.tensor([0.02, 1.0, 7.0, 3e-3, 100.0, 0.5])[:, None]
    importance = torch.rand(64, generator=generator) ** 4 if weighted else None
    got = quantize_weight(r, group=16, dtype=torch.bfloat16, scales="integer", importance=importance)
    counts = (torch.ones(64) if importance is None else importance).double()

    def error_and_loss(row, g, s):
        part = slice(16 * g, 16 * g + 16)
        x = r[row, part].double()
        e = x - (x / s).round().clamp(-7, 7) * s
        return float((e * e * counts[part]).sum()), float((e * x * counts[part]).sum())

    def cost(row, pairs):
        energy = float((r[row].double().square() * counts).sum())
        return energy * sum(e for e, _ in pairs) + 32 * sum(b for _, b in pairs) ** 2

    for row in range(6):
        need = [float(r[row, 16 * g:16 * g + 16].abs().max()) / 7 for g in range(4)]
        ladder = sorted(m * 2.0**e for m in (4, 5, 6, 7) for e in range(-20, 5))
        first = next(i for i, t in enumerate(ladder) if 18 * t >= max(need))
        costs = []
        for t in (ladder[first], ladder[first - 1]):
            tried = [[error_and_loss(row, g, min(max(q, 1), 18) * t) for q in
                      (-(-need[g] // t), need[g] // t, need[g] // t - 1)] for g in range(4)]
            costs += [cost(row, [min(group, key=lambda eb, p=p: eb[0] + p * eb[1]) for group in tried])
                      for p in (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)]
        found = cost(row, [error_and_loss(row, g, float(got.scales[row, g])) for g in range(4)])
        assert found == pytest.approx(min(costs), rel=1e-4)


def laplace(*shape):
    return torch.distributions.Laplace(0.0, 1.0).sample(shape)


def student(*shape):
    return torch.distributions.StudentT(4.0).sample(shape)


def test_the_gain_of_a_layer_is_kept():
    """The smallest squared error alone would lose 0.9 % of it here, in every layer of a model."""
    torch.manual_seed(2)
    for columns in (128, 2048):
        r = torch.randn(512, columns)
        got = {s: quantize_weight(r, dtype=torch.bfloat16, scales=s).dequantize() for s in ("amax", "integer")}
        lost = (r * (r - got["integer"])).sum() / r.square().sum()
        assert abs(float(lost)) < 2e-3
        assert relative_norm(got["integer"], r) < 0.97 * relative_norm(got["amax"], r)


def columns(n, k):
    """Column norms far apart: without smoothing the groups of a channel differ by more than 18."""
    return torch.randn(n, k) * torch.randn(k).exp()


@pytest.mark.parametrize("draw, plain", [(torch.randn, 1.0), (laplace, 1.0), (student, 1.0), (columns, 1.03)])
def test_not_worse_than_the_published_scales(draw, plain):
    torch.manual_seed(5)
    weight, x = draw(96, 512), with_outliers(torch.randn(64, 512), 30)
    fresh = with_outliers(torch.randn(64, 512), 30).double()
    for activations in (None, x):
        error = {}
        for scales in ("amax", "integer"):
            w = tk.quantize.svd_quantize(weight, activations, rank=8, dtype=torch.bfloat16, iterations=3, scales=scales)
            error[scales] = relative_norm(tk.ops.svdq_linear(fresh, w, backend="reference"), fresh @ weight.double().T)
        assert error["integer"] < (plain if activations is None else 1.0) * error["amax"], error


def test_the_search_sees_them():
    """Every candidate of the smoothing search and every round of the low-rank alternation quantizes this way."""
    weight, x = torch.randn(48, 128) * torch.randn(128).exp(), with_outliers(torch.randn(40, 128))
    found = {s: tk.quantize.svd_quantize(weight, x, rank=4, iterations=4, early_stop=False, scales=s).report
             for s in ("amax", "integer")}
    assert bool((found["amax"].smooth.errors != found["integer"].smooth.errors).all())
    assert bool((found["amax"].low_rank_errors != found["integer"].low_rank_errors).all())
    assert float(found["integer"].smooth.errors.min()) < float(found["amax"].smooth.errors.min())


def test_zeros():
    weight = torch.randn(20, 256)
    weight[3], weight[5, 64:128], weight[:, 200:] = 0, 0, 0
    w = tk.quantize.svd_quantize(weight, rank=0, scales="integer")
    assert w.has_integer_scales() and bool((w.dequantize()[weight == 0] == 0).all())
    x = torch.zeros(4, 256)
    assert tk.quantize.svd_quantize(weight, x, rank=2, iterations=1, scales="integer").has_integer_scales()
    zero = tk.quantize.svd_quantize(torch.zeros(4, 64), rank=1, scales="integer")
    assert zero.has_integer_scales() and not bool(zero.effective_weight().any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_the_ends_of_the_storage_dtype(dtype):
    info = torch.finfo(dtype)
    torch.manual_seed(1)
    for size in (info.max, info.max / 5, info.tiny, info.tiny / 64):
        weight = torch.rand(8, 128) * 2 - 1
        weight[:, 0] = 1
        weight = weight * (7.0 * size) if size < 1e37 else weight * size
        got = quantize_weight(weight, dtype=dtype, scales="integer")
        assert torch.equal(got.scales.to(dtype).float(), got.scales) and bool((got.scales > 0).all())
        assert are_integer(got.scales)
        least = torch.finfo(torch.float16).smallest_normal / 2**8 if dtype == torch.float16 else 2.0**-118
        assert bool(((got.dequantize() - weight.double()).abs() <= max(0.13 * 7 * size, least)).all())
    with pytest.raises(ValueError, match="group scales are finite"):
        quantize_weight(torch.full((1, 64), 6e5), dtype=torch.float16, scales="integer")


def test_a_channel_does_not_depend_on_the_others():
    weight = torch.randn(600, 512)
    whole = quantize_weight(weight, scales="integer")
    part = quantize_weight(weight[437:441].clone(), scales="integer")
    assert torch.equal(whole.scales[437:441], part.scales) and torch.equal(whole.codes[437:441], part.codes)


def test_what_integer_scales_are():
    assert are_integer(torch.tensor([[3.0, 54.0], [0.1, 0.1]])) and not are_integer(torch.tensor([[3.0, 57.0]]))
    assert are_integer(torch.tensor([[17.0, 18.0]])) and not are_integer(torch.tensor([[18.0, 19.0]]))
    assert not are_integer(torch.tensor([[0.0, 1.0]])) and not are_integer(torch.tensor([[-1.0, 1.0]]))
    assert not are_integer(torch.tensor([[1e-30, 1.0]])) and not are_integer(torch.tensor([[float("nan"), 1.0]]))
    weight = torch.randn(8, 256)
    assert not tk.quantize.svd_quantize(weight, rank=2).has_integer_scales()
    assert not tk.quantize.svd_quantize(weight, rank=2, format="nvfp4").has_integer_scales()


def test_shared_input_and_module():
    x, weights = torch.randn(40, 128), [torch.randn(n, 128) for n in (32, 48)]
    parts = tk.quantize.svd_quantize_shared(weights, x, rank=8, iterations=2, scales="integer")
    assert all(p.has_integer_scales() for p in parts)
    linear = torch.nn.Linear(128, 48)
    layer = SVDQuantLinear.from_linear(linear, config=tk.SVDQuant(rank=4, scales="integer"))
    assert layer.to_quantized()[0].has_integer_scales() and layer.wscales.dtype == torch.bfloat16
    again = SVDQuantLinear(128, 48, config=tk.SVDQuant(rank=4, scales="integer"))
    again.load_state_dict(layer.state_dict())
    x = x.to(torch.bfloat16).float()
    assert torch.equal(again(x), layer(x))
    torch.testing.assert_close(tk.ops.svdq_linear(x, layer.to_quantized()[0], linear.bias, backend="reference"),
                               layer(x), atol=1e-4, rtol=1e-4)


def test_refused():
    with pytest.raises(ValueError, match="scales with format='nvfp4': expected 'amax', got 'integer'"):
        tk.quantize.svd_quantize(torch.ones(16, 64), rank=0, format="nvfp4", scales="integer")
    with pytest.raises(ValueError, match="scales: expected one of"):
        tk.quantize.svd_quantize(torch.ones(16, 64), rank=0, scales="float")
