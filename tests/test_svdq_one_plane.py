"""Channels whose scales are small integers times one number: code * scale fits a signed byte, or barely does not.

Tokens of integers with a largest value of 127 have a scale of one: y is the integer sum, on tiles rounded to float32
once. The other levels scale and add group by group in float32.
"""

from __future__ import annotations

import pytest
import torch
from generators import poisoned
from test_svdq_fast import same_precision, truth
from tolerance import assert_within_budget

import triskele as tk
from triskele import _native
from triskele.quantize.formats import e2m1_values, unpack_nibbles

TOKENS = (1, 5, 6, 17, 300)


def weight(codes, scales, rank=0):
    """codes int8 [N, K], scales [N, G] -> SVDQWeight with smooth of one."""
    n, k = codes.shape
    nibbles = codes.to(torch.uint8) & 15
    return tk.quantize.SVDQWeight(
        nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scales, (torch.randn(rank, k) / k**0.5).to(torch.bfloat16),
        torch.randn(n, rank).to(torch.bfloat16), torch.ones(k), k)


def integer_weight(n, k, low=-7, rank=0, group=64):
    """What svd_quantize(scales="integer") makes: s = t q, t one of 4, 5, 6, 7 times a power of two, q up to 18."""
    q = torch.randint(1, 19, (n, k // group))
    t = torch.tensor([4.0, 5.0, 6.0, 7.0])[torch.randint(0, 4, (n, 1))] * 2.0 ** torch.randint(-9, 3, (n, 1))
    scales = (q * t).to(torch.bfloat16)
    assert torch.equal(scales.float(), q * t)  # at most 8 significant bits
    return weight(torch.randint(low, 8, (n, k), dtype=torch.int8), scales, rank)


def tokens(m, k):
    x = torch.randint(-127, 128, (m, k)).float()
    x[:, 0] = 127
    return x


def assert_exact(w, x, message=""):
    """The float32 nearest to the exact sum, for every number of tokens; off the tiles, close to it."""
    want = tk.ops.svdq_linear(x.double(), w, backend="reference").float()
    terms = x.abs() @ w.dequantize().float().abs().T
    allowed = 0.0 if _native.cpu_level() == "amx" else 64 * torch.finfo(torch.float32).eps
    for m in TOKENS:
        error = (tk.ops.svdq_linear(x[:m], w, backend="cpu") - want[:m]).abs()
        assert bool((error <= allowed * terms[:m]).all()), (message, m, float(error.max()))


@pytest.mark.parametrize("n, k, group", [(33, 320, 64), (300, 640, 128), (16, 3200, 64), (530, 128, 64)])
def test_integers_equal_the_reference(n, k, group):
    assert_exact(integer_weight(n, k, group=group), tokens(300, k))


def test_long_rows_beyond_24_bits():
    """Sums that float32 does not hold: t times the sum is rounded once, as 256 high + low is."""
    k = 6400
    x, codes = tokens(300, k).abs(), torch.full((32, k), 7, dtype=torch.int8)
    for t in (4.0, 5.0, 6.0, 7.0):
        assert_exact(weight(codes, torch.full((32, 100), 18 * t)), x, t)
        assert_exact(weight(-codes, torch.full((32, 100), 18 * t)), x, t)


@pytest.mark.parametrize("odd", ["q of 19", "t of 9", "t of 11", "code -8 under 17", "code -8 under 18",
                                 "code -8 under 16", "code -8 under -16", "code -8 under 15", "zero", "negative",
                                 "two factors", "one large"])
def test_one_channel_that_barely_fits_or_barely_does_not(odd):
    """Its 256 channels take another path together with it, and keep their bits."""
    n, k = 300, 320
    plain = integer_weight(n, k)
    for at in (0, 17, 255, 299):
        codes, scales = unpack_nibbles(plain.qweight, "int4").to(torch.int8), plain.wscales.float().clone()
        q = torch.tensor([3.0, 18, 7, 1, 12])
        if odd.startswith("code -8"):
            q[1] = float(odd.split()[-1])
            codes[at, 64:128] = 7
            codes[at, 90] = -8
        elif odd == "q of 19":
            q[1] = 19
            codes[at, 64:128] = -7
        elif odd.startswith("t of"):
            q, codes[at] = torch.tensor([18.0, 17, 13, 18, 1]) * float(odd.split()[-1]), 7
        elif odd == "two factors":  # 63 = 7 * 9, 45 = 5 * 9: what is left after the 7 must still fit
            q = torch.tensor([63.0, 21, 105, 126, 7])
        elif odd == "zero":
            q[:] = 0
        elif odd == "negative":
            q = -q
        else:
            q[3] = 250
        scales[at] = q * 0.5
        w = weight(codes, scales)
        x = tokens(300, k)
        assert_exact(w, x, f"{odd} in channel {at}")
        rest = torch.arange(n) != at
        y, before = tk.ops.svdq_linear(x, w), tk.ops.svdq_linear(x, plain)
        assert torch.equal(y[:, rest], before[:, rest])


def test_largest_products():
    """127 * 127 everywhere: 18 * 7 and 16 * 8."""
    x = torch.full((300, 4096), 127.0)
    for code, q in ((7, 18), (-7, 18), (-8, 16), (-8, 15), (-8, -16), (7, -18)):
        codes = torch.full((48, 4096), code, dtype=torch.int8)
        assert_exact(weight(codes, torch.full((48, 64), 7.0 * q)), x, (code, q))


@pytest.mark.parametrize("dtype, m, n", [(torch.bfloat16, 523, 2080), (torch.bfloat16, 700, 1616),
                                         (torch.float32, 523, 1040), (torch.float16, 523, 1041)])
@pytest.mark.parametrize("way", ["one plane", "two planes", "float sums in between"])
def test_output_larger_than_a_cache(way, dtype, m, n):
    """It is written past the caches, in lines of two blocks of channels where it is bfloat16 and its rows are lines."""
    w, bias, x = integer_weight(n, 128, rank=3), torch.randn(n), torch.randn(m, 128).to(dtype)
    if way != "one plane":
        scales = w.wscales.float()
        scales[::256 if way == "two planes" else 512, 1] *= 1.25 if way == "two planes" else 1.0001
        w = tk.quantize.SVDQWeight(w.qweight, scales, w.lora_down, w.lora_up, w.smooth, 128)
    y = tk.ops.svdq_linear(x, w, bias)
    assert_within_budget(y, truth(x, w, bias), same_precision(x, w, bias).to(dtype))
    for at in (*range(0, m - 20, 97), m - 20):
        assert torch.equal(tk.ops.svdq_linear(x[at:at + 20], w, bias), y[at:at + 20]), at


def test_e2m1_codes_in_groups_of_64():
    """The raw op takes them with whole scales: 12 halves times up to 10 fit a byte, 11 do not."""
    assert not _native.cpu_library()
    native = torch.ops.triskele_native
    qweight, x = torch.randint(0, 256, (40, 160), dtype=torch.uint8), tokens(20, 320)
    parts = native.svdq_quantize(x, torch.ones(320), torch.zeros(0, 320), 0.0, 64)
    for top in (10, 11):
        scales = torch.randint(1, top + 1, (40, 5)).float() * 5
        values = e2m1_values(unpack_nibbles(qweight, "nvfp4"), torch.float64)
        want = x.double() @ (values * scales.double().repeat_interleave(64, 1)).T
        y = native.svdq_gemm(*parts, qweight, scales, torch.zeros(40, 0), None, True, False, 0)
        assert torch.equal(y.double(), want), top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, k, n", [(40, 320, 70), (300, 3200, 300), (270, 6208, 40)])
def test_against_float64(m, k, n, dtype):
    """Real tokens, low rank and bias; any part of a batch and any number of threads give the same bits."""
    w, bias, x = integer_weight(n, k, rank=20), torch.randn(n), torch.randn(m, k).to(dtype)
    y = tk.ops.svdq_linear(x, w, bias, backend="cpu")
    assert_within_budget(y, truth(x, w, bias), same_precision(x, w, bias).to(dtype))
    for at in (0, 1, 33, m - 1):
        assert torch.equal(tk.ops.svdq_linear(x[at:at + 1], w, bias), y[at:at + 1]), at
    for part in (slice(0, 6), slice(3, 20), slice(m - 37, m)):
        assert torch.equal(tk.ops.svdq_linear(x[part], w, bias), y[part]), part
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(tk.ops.svdq_linear(x, w, bias), y), threads
    finally:
        torch.set_num_threads(before)
    copies = [poisoned(t) for t in (w.qweight, w.wscales, w.lora_down, w.lora_up, w.smooth)]
    assert torch.equal(tk.ops.svdq_linear(poisoned(x), tk.quantize.SVDQWeight(*copies, k), poisoned(bias)), y)
