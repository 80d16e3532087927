"""The CUDA kernels of the 4-bit linear, thread by thread on a CPU: integers, error budget, ragged sizes, refusals."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from generators import poisoned, strided, with_outliers
from tolerance import assert_within_budget, relative_norm

import triskele as tk
from triskele import _native
from triskele.backend import TABLES
from triskele.ops.svdq import cuda_backend, reference
from triskele.quantize.formats import (
    activation_codes,
    e2m1_values,
    fake_quantize_activation,
    pack_nibbles,
    unpack_nibbles,
)

BF16, F16 = torch.bfloat16, torch.float16


def make(k, n, rank=8, group=64, scales=BF16, format="int4", activation="int8", shift=0.0, integer=False):
    """A weight without a calibration: any codes but -8, scales within a factor of four, or multiples 1 … 18 of one."""
    groups = -(-k // group)
    nibbles = torch.randint(-7, 8, (n, groups * group, ), dtype=torch.int8)
    nibbles[:, k:] = 0
    nibbles = nibbles.to(torch.uint8) & 15
    steps = torch.rand(n, groups) * 0.03 + 0.01
    if integer:
        steps = torch.randint(1, 19, (n, groups)) * torch.randint(4, 8, (n, 1)) * 2.0 ** torch.randint(-13, -9, (n, 1))
    return tk.quantize.SVDQWeight(
        nibbles[:, 0::2] | nibbles[:, 1::2] << 4, steps.to(scales),
        (torch.randn(rank, k) / k**0.5).to(BF16), torch.randn(n, rank).to(BF16), (torch.rand(k) * 2 + 0.3).to(BF16), k,
        format, activation, None if format == "int4" else torch.tensor([0.01]), shift)


def run(x, w, bias=None, **options):
    """The launcher of the weight's activation on the emulated kernels."""
    f = cuda_backend.w4a4 if w.activation == "int4" else cuda_backend.w4a8
    return f(x, w.qweight, w.wscales, w.wtscale, w.lora_down, w.lora_up, w.smooth, bias, w.format, w.activation,
             w.shift, native=torch.ops.triskele_emulated, **options)


def natural(codes):
    """Columns back from the order of the 8-bit codes: in each 32, the even ones and then the odd ones."""
    return codes.unflatten(-1, (-1, 2, 16)).transpose(-1, -2).flatten(-3)


def widened(w, chunk):
    """What svdq_widen promises, in float32 as it computes: codes [N, K' up to 256], scales [chunks, N]."""
    nibbles = unpack_nibbles(w.qweight, w.format)
    values = nibbles.float() if w.format == "int4" else e2m1_values(nibbles, torch.float32) * 2
    steps = w.wscales.float() if w.wtscale is None else w.wscales.float() * w.wtscale.float()[:, None]
    steps = (steps if w.format == "int4" else steps * 0.5).repeat_interleave(w.group, 1)
    missing = -values.shape[1] % 256
    values, steps = (torch.nn.functional.pad(t, (0, missing)).unflatten(1, (-1, chunk)) for t in (values, steps))
    top = steps.abs().amax(-1, keepdim=True)
    if w.format == "int4":
        fits = (values.abs() * steps.abs()).amax(-1, keepdim=True) * 18 <= top * 127
        levels = torch.where(fits, 18.0, 15.0)
    else:
        levels = torch.full_like(top, 10.0)
    alive = top >= 1e-30
    codes = torch.where(alive, values * (steps * (levels / top)), torch.zeros_like(values)).round()
    return codes, torch.where(alive, top / levels, torch.zeros_like(top))


def quantized_weight(w, chunk):
    codes, scales = widened(w, chunk)
    return (codes.double() * scales.double()).flatten(1)[:, :w.in_features]


def multiplied_weight(w):
    """With the scales that svdq_multipliers rounds to."""
    multipliers, units, _ = torch.ops.triskele_emulated.svdq_multipliers(w.qweight, w.wscales, True)
    steps = multipliers[:, :w.wscales.shape[1]].double() * units.double()[:, None]
    return (unpack_nibbles(w.qweight, "int4").double() * steps.repeat_interleave(64, 1))[:, :w.in_features]


def case(way, k, n, rank=8, **options):
    """(weight, options of the launcher, the weight that the kernels see: None for its own) of a way to multiply."""
    if way == "w4a4":
        return make(k, n, rank, activation="int4", **options), {}, None
    w = make(k, n, rank, integer=way == "before", **options)
    seen = {"before": lambda w: None, "after": multiplied_weight, "w8a8": lambda w: quantized_weight(w, 256)}[way](w)
    return w, {"widen": way == "w8a8"}, seen


def truth(x, w, bias, residual=None):
    """float64, with `residual` in place of the weight's own."""
    if residual is None:
        residual = w.dequantize()
    z = fake_quantize_activation(reference.smoothed(x, w.smooth, w.shift), w.activation, w.shift > 0)
    y = z @ residual.T + (x.double() @ w.lora_down.double().T) @ w.lora_up.double().T
    return y if bias is None else y + bias.double()


def same_precision(x, w, bias, residual=None):
    residual = (w.dequantize() if residual is None else residual).float()
    z = fake_quantize_activation(reference.smoothed(x, w.smooth, w.shift), w.activation, w.shift > 0, torch.float32)
    y = z @ residual.T + (x.float() @ w.lora_down.float().T) @ w.lora_up.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


# ---- codes ----

@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("m, k, rank", [(1, 8, 1), (19, 328, 40), (33, 3600, 16)])
def test_int8_codes_and_projection(m, k, rank, dtype):
    """Codes and scales bit for bit; 3600 columns are more than shared memory keeps."""
    ops = emulated.load("svdq_quantize_sm80")
    x = with_outliers(torch.randn(m, k), 100, 0.02).to(dtype)
    smooth, down = (torch.rand(k) + 0.3).to(BF16), (torch.randn(rank, k) / k**0.5).to(dtype)
    for shift in (0.0, 0.171875):
        codes, scales, projected, units = ops.svdq_quantize_int8(poisoned(x), smooth, down, shift, 256)
        want, want_scales = activation_codes(reference.smoothed(x, smooth, shift), "int8", False)
        assert codes.shape == (m, -(-k // 256) * 256)
        codes = natural(codes)
        assert not codes[:, k:].any()
        assert torch.equal(codes[:, :k].float(), want.squeeze(1)) and torch.equal(scales, want_scales.squeeze(1))
        assert projected.shape == (m, -(-rank // 16) * 16) and not projected[:, rank:].any()
        assert (units.log2() == units.log2().round()).all() and (projected.abs().amax(1) <= 2).all()
        exact = x.double() @ down.double().T
        rounding = exact.abs().amax(1, keepdim=True) * torch.finfo(dtype).eps
        assert ((projected[:, :rank].double() * units.double()[:, None] - exact).abs() <= rounding + 1e-6).all()
    alone = [ops.svdq_quantize_int8(row, smooth, down, 0.171875, 256) for row in x[-2:].split(1)]
    assert torch.equal(natural(torch.cat([parts[0] for parts in alone])), codes[-2:])
    for i, part in enumerate((scales, projected, units), 1):
        assert torch.equal(torch.cat([parts[i] for parts in alone]), part[-2:])


@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_int4_codes(is_unsigned, dtype):
    ops = emulated.load("svdq_quantize_sm80")
    m, k = 18, 584
    x = with_outliers(torch.randn(m, k), 100, 0.02).to(dtype)
    x[3, 64:128] = 0
    if is_unsigned:
        x = x.abs()
    smooth = (torch.rand(k) + 0.3).to(BF16)
    codes, scales, _, _ = ops.svdq_quantize_int4(x, smooth, x.new_ones(1, k), 0.0, is_unsigned, 64)
    want, want_scales = activation_codes(reference.smoothed(x, smooth, 0.0), "int4", is_unsigned)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).to(torch.int8)
    got = nibbles if is_unsigned else (nibbles ^ 8) - 8
    assert torch.equal(got.float(), want.flatten(1)) and torch.equal(scales[:, :m].T, want_scales)


def test_zero_and_non_finite_tokens():
    ops = emulated.load("svdq_quantize_sm80")
    x = torch.randn(5, 136).to(BF16)
    x[1], x[2, 5], x[3, 9], x[4] = 0, float("nan"), float("-inf"), 1e-33
    codes, scales, _, units = ops.svdq_quantize_int8(x, torch.ones(136), x.new_ones(3, 136), 0.0, 256)
    assert not codes[1:].any() and scales[1] == scales[4] == 0 and scales[2:4].isnan().all()
    assert units[2:4].isnan().all() and units[1] > 0


@pytest.mark.parametrize("format, group", [("int4", 64), ("int4", 16), ("int4", 512), ("nvfp4", 16)])
@pytest.mark.parametrize("chunk", [64, 256])
def test_widened_weights(format, group, chunk):
    ops = emulated.load("svdq_widen_sm80")
    w = make(600, 11, group=group, format=format)
    w.wscales[3] = 0
    w.wscales[4, 0] = -w.wscales[4, 0]
    w.qweight[5, 7] = 0x88 if format == "int4" else 0xff
    scales = w.wscales if format == "int4" else w.wscales.float() * w.wtscale
    codes, got = ops.svdq_widen(w.qweight, scales, format == "nvfp4", chunk)
    want, want_scales = widened(w, chunk)
    assert codes.dtype == torch.int8 and got.shape == (want_scales.shape[1], 12)
    assert torch.equal(natural(codes).float(), want.flatten(1)) and torch.equal(got[:, :11].T, want_scales.squeeze(-1))
    if group % chunk == 0:   # a chunk in one group: nothing is lost
        torch.testing.assert_close(quantized_weight(w, chunk), w.dequantize(), rtol=1e-6, atol=0)


# ---- scales as integers ----

def test_integer_scales_are_found():
    """Multiples up to 18 come back exactly; the flag says where code * multiplier fits int8."""
    ops = emulated.load("svdq_multipliers_sm80")
    w = make(600, 330, integer=True)
    w.wscales[5], w.wscales[6, 2], w.wscales[7] = 0.25, -w.wscales[6, 2], 0
    w.wscales[70, 1] *= 1.5                                   # no longer multiples up to 18, whatever it was
    w.wscales[71, :2] = torch.tensor([19.0, 18.0]) / 64
    w.wscales[8, 4], w.wscales[9, 3] = float("nan"), float("inf")
    w.wscales[140] = torch.arange(6, 16) / 128                # up to 15: a code of -8 is no matter
    w.wscales[200] = torch.arange(9, 19) / 128
    w.qweight[140, 7] = 0x83
    w.qweight[200, 301] = 0x18                                # the last nibbles there are
    for scales in (w.wscales, w.wscales.float()):
        multipliers, units, fits = ops.svdq_multipliers(w.qweight, scales, True)
        assert multipliers.shape == (330, 12) and not multipliers[:, 10:].any()
        assert units[8:10].isnan().all() and not multipliers[7:10].any() and units[7] == 0
        exact = torch.ones(330, dtype=torch.bool)
        exact[[8, 9, 70, 71]] = False
        assert torch.equal((multipliers[:, :10] * units[:, None])[exact], scales.float()[exact])
        assert multipliers[exact].abs().max() == 18 and multipliers[71].max() > 1000
        assert fits.tolist() == [1, 0, 1, 0, 1, 1]
    assert not ops.svdq_multipliers(w.qweight, scales, False)[2].any()


@pytest.mark.parametrize("groups", [1, 3, 48, 1024])
def test_other_scales_are_rounded_within_the_bound(groups):
    """|unit m - s| <= unit / 2, and sum |m| 65024 < 2^31: no order of a token's products passes int32."""
    ops = emulated.load("svdq_multipliers_sm80")
    scales = torch.rand(40, groups) * torch.randn(40, groups).exp()
    scales[0] = 1.0 + torch.rand(groups) * 1e-3               # all round the same way
    scales[1, 0], scales[2], scales[3] = 1e6, scales[2] * 1e30, scales[3] * 1e-28
    multipliers, units, _ = ops.svdq_multipliers(torch.zeros(40, groups * 32, dtype=torch.uint8), scales, True)
    multipliers, units = multipliers[:, :groups].double(), units.double()[:, None]
    assert multipliers.abs().sum(1).max() * 64 * 8 * 127 < 2**31 and multipliers.max() <= 32767
    assert ((multipliers * units - scales.double()).abs() <= units * 0.5001).all()
    many = multipliers.sum(1) > 18 * groups                   # not the multiples of one number
    assert groups == 1 or many.all()
    assert (multipliers.sum(1)[many] > 32000 - groups).all()


# ---- the layer ----

SHAPES = [(1, 8, 1, 0), (5, 200, 48, 16), (130, 264, 197, 7), (37, 520, 65, 40), (129, 64, 200, 128),
          (193, 264, 130, 16), (63, 3072, 24, 32)]


KERNELS = ("svdq_quantize_sm80", "svdq_multipliers_sm80", "svdq_widen_sm80", "svdq_w8a8_sm90", "svdq_w4a8_sm90",
           "svdq_w4a4_sm80")
WAYS = ("before", "after", "w8a8", "w4a4")
"""W4A8 with group scales multiplied before the product or after it, W4A8 on widened weights, W4A4."""


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("m, k, n, rank", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_layer_against_float64(way, m, k, n, rank, dtype):
    emulated.load(*KERNELS)
    w, options, seen = case(way, k, n, rank, scales=BF16 if m % 2 else torch.float32)
    x, bias = with_outliers(torch.randn(m, k), 100, 0.05).to(dtype), torch.randn(n).to(dtype)
    y = run(x, w, bias, **options)
    assert y.dtype == dtype and y.shape == (m, n)
    if way == "before":
        assert torch.equal(run(x, w, bias, in_operand=False), y)
    if way in ("before", "after") and m > 128:   # with one multiprocessor, tiles of 192 tokens instead of 64
        with emulated.processors(1):
            assert torch.equal(run(x, w, bias), y) and torch.equal(run(x, w, bias, clusters=False), y)
    assert_within_budget(y, truth(x, w, bias, seen), same_precision(x, w, bias, seen))


def test_the_quantizers_integer_scales_are_multiplied_before_the_product():
    emulated.load(*KERNELS)
    w = tk.quantize.svd_quantize(torch.randn(130, 584) / 24, rank=8, scales="integer", iterations=1, dtype=BF16)
    assert torch.ops.triskele_emulated.svdq_multipliers(w.qweight, w.wscales, True)[2].all()
    x = with_outliers(torch.randn(70, 584), 30, 0.02).to(BF16)
    assert_within_budget(run(x, w), truth(x, w, None), same_precision(x, w, None))


def test_w4a4_unsigned():
    emulated.load("svdq_quantize_sm80", "svdq_w4a4_sm80")
    w, bias = make(200, 72, 8, activation="int4", shift=0.171875), torch.randn(72)
    x = torch.nn.functional.gelu(torch.randn(20, 200)).to(BF16)
    assert_within_budget(run(x, w, bias), truth(x, w, bias), same_precision(x, w, bias))


@pytest.mark.parametrize("format, group, exact", [("int4", 128, False), ("int4", 256, True), ("int4", 32, False),
                                                  ("nvfp4", 16, False)])
def test_w4a8_formats(format, group, exact):
    emulated.load("svdq_quantize_sm80", "svdq_widen_sm80", "svdq_w8a8_sm90")
    w = make(600, 150, 20, group, format=format, shift=0.171875)
    x = torch.randn(9, 600).to(F16)
    residual = None if exact else quantized_weight(w, cuda_backend.chunk_columns(format, group))
    assert_within_budget(run(x, w), truth(x, w, None, residual), same_precision(x, w, None, residual))


@pytest.mark.parametrize("way", WAYS)
def test_a_token_alone_and_in_any_schedule(way):
    """Several tiles a block, warps in any order, more or fewer blocks, tiles of 64 or 192 tokens: the same bits."""
    emulated.load(*KERNELS)
    (w, options, _), bias = case(way, 264, 200, 24), torch.randn(200)
    x = with_outliers(torch.randn(380, 264), 100, 0.02).to(BF16)
    y = run(x, w, bias, **options)
    for rows in (slice(0, 1), slice(77, 80), slice(365, 380)):
        assert torch.equal(run(x[rows], w, bias, **options), y[rows])
    with emulated.order("backward"), emulated.processors(1):
        assert torch.equal(run(x, w, bias, **options), y)
    with emulated.order("random", 5), emulated.processors(7):
        assert torch.equal(run(x[:60], w, bias, **options), y[:60])
    with emulated.order("random", 6), emulated.processors(2):   # W4A8: tiles of 192 tokens, two blocks that share them
        assert torch.equal(run(x[:210], w, bias, **options), y[:210])


@pytest.mark.parametrize("way, m, n", [("before", 390, 1100), ("after", 1600, 140), ("w8a8", 1090, 200)])
def test_more_tiles_than_a_band(way, m, n):
    emulated.load(*KERNELS)
    (w, options, seen), x = case(way, 64, n, 4), torch.randn(m, 64).to(F16)
    with emulated.processors(2):   # 1100 channels: the last pair of tiles has one
        y = run(x, w, **options)
    assert_within_budget(y, truth(x, w, None, seen), same_precision(x, w, None, seen))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("way", WAYS)
def test_outliers_dead_and_broken_tokens(way, dtype):
    emulated.load(*KERNELS)
    (w, options, residual), bias = case(way, 328, 70), torch.randn(70).to(dtype)
    x = torch.full((6, 328), 100.0)
    x[:, ::2] *= -1
    x[1, :] = 100.0
    x = x.to(dtype)
    y = run(x, w, bias, **options)
    assert_within_budget(y, truth(x, w, bias, residual), same_precision(x, w, bias, residual))
    x[0], x[2, 3], x[4, 300] = 0, float("nan"), float("inf")
    again = run(x, w, bias, **options)
    assert torch.equal(again[0], bias) and again[[2, 4]].isnan().all() and torch.equal(again[[1, 3, 5]], y[[1, 3, 5]])


def test_extreme_codes():
    """The largest integers there are, all of one sign: -8 (which svdq_widen must halve its step for), 127, 7."""
    emulated.load(*KERNELS)
    for byte, value in ((0x88, -8), (0x77, 7)):
        for activation in ("int8", "int4"):
            top = 127.0 if activation == "int8" else 7.0
            w = tk.quantize.SVDQWeight(
                torch.full((9, 160), byte, dtype=torch.uint8), torch.ones(9, 5), torch.zeros(1, 320), torch.zeros(9, 1),
                torch.ones(320), 320, "int4", activation)
            want = torch.full((3, 9), top * value * 320).to(BF16)
            x = torch.full((3, 320), top).to(BF16)
            for options in ({}, {"widen": True}) if activation == "int8" else ({},):
                assert torch.equal(run(x, w, **options), want), (byte, activation, options)


def test_sums_reach_the_bound_and_no_further():
    """Every product of one sign and the largest there is, with multipliers that are rounded to their largest sum."""
    emulated.load(*KERNELS)
    scales = torch.ones(9, 5)
    scales[:, 3] = 0.37   # no multiple: fixed point
    for byte, value in ((0x88, -8), (0x77, 7)):
        w = tk.quantize.SVDQWeight(torch.full((9, 160), byte, dtype=torch.uint8), scales, torch.zeros(1, 320),
                                   torch.zeros(9, 1), torch.ones(320), 320, "int4", "int8")
        multipliers, _, fits = torch.ops.triskele_emulated.svdq_multipliers(w.qweight, scales, True)
        assert not fits.any() and multipliers.int().sum(1).min() > 32760
        x = torch.full((2, 320), 127.0).to(BF16)
        torch.testing.assert_close(run(x, w).double(), torch.full((2, 9), value * 127 * 64 * 4.37).double(), rtol=5e-3,
                                   atol=0)


def test_layouts_and_empty_batches():
    emulated.load(*KERNELS)
    for activation in ("int8", "int4"):
        w, bias, x = make(72, 24, 3, activation=activation), torch.randn(24), torch.randn(5, 72).to(BF16)
        y = run(x, w, bias)
        copies = [poisoned(t, margin=3) for t in (w.qweight, w.wscales, w.lora_down, w.lora_up, w.smooth)]
        moved = tk.quantize.SVDQWeight(*copies, 72, "int4", activation)
        assert torch.equal(run(poisoned(x, margin=1), moved, poisoned(bias, margin=1)), y)
        assert torch.equal(run(strided(x), w, strided(bias)), y)
        assert torch.equal(run(x, w, bias.double()), y)
        assert run(x[:0], w, bias).shape == (0, 24)


def test_a_packed_checkpoint_runs_the_same():
    """nunchaku's layout and back: the same bits from the kernels."""
    emulated.load(*KERNELS)
    w, x = make(200, 136, 20), torch.randn(4, 200).to(BF16)
    packed = tk.quantize.nunchaku.pack(w.codes, w.scales, w.lora_down, w.lora_up, w.smooth)
    back = tk.quantize.nunchaku.unpack(packed, shape=w.shape, rank=20)
    for activation in ("int8", "int4"):
        again = tk.quantize.SVDQWeight(
            pack_nibbles(torch.nn.functional.pad(back["codes"], (0, 56))), back["scales"], back["lora_down"],
            back["lora_up"], back["smooth"], 200, "int4", activation)
        assert torch.equal(run(x, again), run(x, replace(w, activation=activation)))


# ---- what the rounding of svdq_widen costs ----

def drawn(kind, n, k):
    if kind == "gaussian":
        return torch.randn(n, k)
    if kind == "student":
        return torch.distributions.StudentT(4.0).sample((n, k))
    return torch.randn(n, k) * torch.exp(torch.randn(k))   # columns of very different size


@pytest.mark.parametrize("kind", ["gaussian", "student", "columns"])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_widening_keeps_the_error_within_one_percent(kind, format):
    """The contract: error against the unquantized layer <= that of the fake-quantized one + 1 %."""
    weight, x = drawn(kind, 96, 1024) / 32, with_outliers(torch.randn(64, 1024), 20, 0.01)
    w = tk.quantize.svd_quantize(weight, rank=16, format=format, iterations=1, dtype=BF16)
    exact = x.double() @ weight.double().T
    fake = relative_norm(truth(x, w, None), exact)
    chunk = 256 if format == "int4" else 64
    widened_error = relative_norm(truth(x, w, None, quantized_weight(w, chunk)), exact)
    assert 0.02 < fake < 0.3 and widened_error <= 1.01 * fake, (fake, widened_error)


@pytest.mark.parametrize("kind", ["gaussian", "student", "columns"])
@pytest.mark.parametrize("k", [1024, 12288])
def test_rounded_scales_keep_the_error_within_one_percent(kind, k):
    """The contract again, with scales that svdq_multipliers rounds."""
    emulated.load("svdq_multipliers_sm80")
    groups = k // 64
    weight, x = drawn(kind, 24, k) / 32, with_outliers(torch.randn(32, k), 20, 0.01)
    steps = (weight.unflatten(1, (groups, 64)).abs().amax(-1) / 7).to(BF16)
    codes = (weight.unflatten(1, (groups, 64)) / steps.float()[..., None]).round().clamp(-7, 7).flatten(1)
    w = tk.quantize.SVDQWeight(pack_nibbles(codes.to(torch.int8)), steps, torch.zeros(1, k), torch.zeros(24, 1),
                               torch.ones(k), k, "int4", "int8")
    exact = x.double() @ weight.double().T
    fake = relative_norm(truth(x, w, None), exact)
    rounded = relative_norm(truth(x, w, None, multiplied_weight(w)), exact)
    assert 0.02 < fake < 0.6 and rounded <= 1.003 * fake, (fake, rounded)


# ---- refusals ----

@pytest.mark.parametrize("options, message", [
    ({"dtype": torch.float64}, "takes float16 and bfloat16, got torch.float64"),
    ({"dtype": torch.float32}, "takes float16 and bfloat16, got torch.float32"),
    ({"k": 68}, "takes in_features in multiples of 8, got 68"),
    ({"rank": 130}, "takes ranks up to 128, got 130")])
def test_refusals(options, message):
    k = options.get("k", 136)
    w, x = make(k, 140, options.get("rank", 4)), torch.randn(2, k, dtype=options.get("dtype", BF16))
    inputs = (x, w.qweight, w.wscales, w.wtscale, w.lora_down, w.lora_up, w.smooth, None)
    for activation, op in (("int8", "svdq.w4a8"), ("int4", "svdq.w4a4")):
        entry = TABLES[op][0]
        assert entry.name == "cuda" and entry.why_not(*inputs, "int4", activation, 0.0) == [message]


def test_refusals_of_w4a4_alone():
    entry = TABLES["svdq.w4a4"][0]
    for w, message in ((make(128, 8, format="nvfp4", group=16), "takes weights in int4, got nvfp4"),
                       (make(128, 8, group=128), "takes weights in groups of 64, got 128")):
        inputs = (torch.randn(2, 128).to(BF16), w.qweight, w.wscales, w.wtscale, w.lora_down, w.lora_up, w.smooth, None,
                  w.format)
        assert entry.why_not(*inputs, "int4", 0.0) == [message]
        assert TABLES["svdq.w4a8"][0].why_not(*inputs, "int8", 0.0) == []


def test_chips(monkeypatch):
    """sm_90 alone for W4A8, sm_80 … sm_89 alone for W4A4."""
    monkeypatch.setattr(_native, "cuda_library", lambda: [])
    runs = {}
    for chip in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, chip=chip: chip)
        runs[chip] = [not TABLES[op][0].missing() for op in ("svdq.w4a8", "svdq.w4a4")]
    assert runs == {chip: [chip == (9, 0), chip[0] == 8] for chip in runs}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert cuda_backend.w4a4_missing() == [
        "needs tensor cores that multiply 4-bit integers (compute capability 8.0 to 8.9), got 9.0"]
    monkeypatch.setattr(_native, "cuda_library", lambda: ["torch sees no CUDA device"])
    assert [TABLES[op][0].missing() for op in ("svdq.w4a8", "svdq.w4a4")] == [["torch sees no CUDA device"]] * 2


def test_native_ops_check_what_they_are_given():
    ops = emulated.load(*KERNELS)
    x, down = torch.randn(4, 64).to(BF16), torch.zeros(8, 64).to(BF16)
    with pytest.raises(RuntimeError, match="smooth size: expected 64, got 63"):
        ops.svdq_quantize_int8(x, torch.ones(63), down, 0.0, 256)
    with pytest.raises(RuntimeError, match="K in multiples of 8"):
        ops.svdq_quantize_int8(x[:, :60].contiguous(), torch.ones(60), down[:, :60].contiguous(), 0.0, 256)
    with pytest.raises(RuntimeError, match="x in bfloat16 or float16"):
        ops.svdq_quantize_int4(x.float(), torch.ones(64), down.float(), 0.0, False, 64)
    with pytest.raises(RuntimeError, match="a chunk of 64 or 256 columns"):
        ops.svdq_widen(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1), False, 128)
    tokens, up = ops.svdq_quantize_int8(x, torch.ones(64), down, 0.0, 256), torch.zeros(4, 8).to(BF16)
    with pytest.raises(RuntimeError, match="a scale for every 64 of qweight's columns"):
        ops.svdq_multipliers(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1), True)
    with pytest.raises(RuntimeError, match="at most 65536 columns"):
        ops.svdq_multipliers(torch.zeros(1, 32 * 1025, dtype=torch.uint8), torch.ones(1, 1025), True)
    weights = torch.zeros(4, 32, dtype=torch.uint8)
    scales = ops.svdq_multipliers(weights, torch.ones(4, 1), True)
    with pytest.raises(RuntimeError, match="qweight with the columns of codes"):
        ops.svdq_w4a8_gemm(*tokens, torch.zeros(4, 160, dtype=torch.uint8), *scales, up, None, True)
    with pytest.raises(RuntimeError, match="multipliers columns: expected 4, got 8"):
        ops.svdq_w4a8_gemm(*tokens, weights, torch.zeros(4, 8, dtype=torch.int16), *scales[1:], up, None, True)
    with pytest.raises(RuntimeError, match="bias size: expected 4, got 5"):
        ops.svdq_w4a8_gemm(*tokens, weights, *scales, up, torch.ones(5), True)
    weights = ops.svdq_widen(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1), False, 64)
    with pytest.raises(RuntimeError, match="down columns: expected 32, got 16"):
        ops.svdq_w8a8_gemm(*tokens, *weights, torch.zeros(4, 24).to(BF16), None)
