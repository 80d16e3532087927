"""The CPU kernels of svdq_linear where their blocks end: ragged sizes, few tokens, outliers, cuts of K, levels."""

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
from triskele.ops.svdq import reference
from triskele.quantize.formats import activation_codes, fake_quantize_activation

FEW = tuple(range(1, 34))
CHANNELS = (1, 15, 16, 17, 63, 64, 65, 100)


def make(k, n, rank=8, group=64, scales=torch.bfloat16, format="int4"):
    """A weight without a calibration: any codes, scales within a factor of four."""
    groups = -(-k // group)
    return tk.quantize.SVDQWeight(
        torch.randint(0, 256, (n, groups * group // 2), dtype=torch.uint8),
        (torch.rand(n, groups) * 0.03 + 0.01).to(scales),
        (torch.randn(rank, k) / k**0.5).to(torch.bfloat16), torch.randn(n, rank).to(torch.bfloat16),
        (torch.rand(k) * 2 + 0.3).to(torch.bfloat16), k, format, "int8",
        None if format == "int4" else torch.tensor([0.01]))


def truth(x, w, bias):
    return tk.ops.svdq_linear(x.double(), w, None if bias is None else bias.double(), backend="reference")


def same_precision(x, w, bias):
    z = fake_quantize_activation(reference.smoothed(x, w.smooth, w.shift), "int8", False, torch.float32)
    y = z @ w.dequantize().float().T + (x.float() @ w.lora_down.float().T) @ w.lora_up.float().T
    return (y if bias is None else y + bias).to(x.dtype)


@pytest.mark.parametrize("k, group", [(64, 64), (200, 64), (640, 64), (1100, 64), (512, 128), (96, 32), (304, 16)])
def test_every_few_tokens_and_any_channels(k, group):
    """M = 1 ... 33 are cut differently by every path; each token must have the bits that it has alone."""
    for n in CHANNELS:
        w, bias = make(k, n, group=group), torch.randn(n)
        x = with_outliers(torch.randn(33, k), 100, 0.02)
        alone = torch.cat([tk.ops.svdq_linear(row, w, bias) for row in x.split(1)])
        assert_within_budget(alone, truth(x, w, bias), same_precision(x, w, bias), what=f"N={n}")
        for m in FEW if n in (17, 65) else (5, 6, 7, 16, 33):
            assert torch.equal(tk.ops.svdq_linear(x[:m], w, bias), alone[:m]), (m, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 16, 33])
def test_low_rank_across_cuts_of_k(dtype, rank):
    """The projection down is cut into stretches of 512 columns: none is lost or added twice."""
    for k in (511, 512, 513, 1025):
        w, bias, x = make(k, 40, rank), torch.randn(40), torch.randn(19, k).to(dtype)
        y = tk.ops.svdq_linear(x, w, bias)
        assert_within_budget(y, truth(x, w, bias), same_precision(x, w, bias), what=f"K={k}")
        assert torch.equal(tk.ops.svdq_linear(x[7:8], w, bias), y[7:8])


def test_more_tokens_than_a_block():
    """Blocks of 64 tokens, fewer where x is long; 8 tokens of a block are projected together."""
    for m, k in ((63, 128), (65, 128), (137, 128), (150, 9000)):
        w, x = make(k, 33), torch.randn(m, k)
        y = tk.ops.svdq_linear(x, w)
        assert relative_norm(y, truth(x, w, None)) < 1e-5
        for at in range(0, m, 31):
            assert torch.equal(tk.ops.svdq_linear(x[at:at + 1], w), y[at:at + 1]), (m, at)


def test_blocks_of_tokens_channels_and_k():
    """More than 256 tokens, 256 channels and 3,072 columns, where the tiles keep integer sums in memory in between."""
    for m, k, n, group in ((300, 3200, 300, 64), (270, 6208, 40, 64), (40, 3328, 290, 256)):
        w, bias, x = make(k, n, group=group), torch.randn(n), torch.randn(m, k)
        y = tk.ops.svdq_linear(x, w, bias)
        assert_within_budget(y, truth(x, w, bias), same_precision(x, w, bias), what=f"{m, k, n}")
        for at in (0, 1, 33, m - 1):
            assert torch.equal(tk.ops.svdq_linear(x[at:at + 1], w, bias), y[at:at + 1]), (m, at)


@pytest.mark.parametrize("spoil", [1e4, 0.0, -0.02, 1e-40, 0.0123456789])  # the last: 24 bits
def test_channels_whose_scales_are_no_small_integers(spoil):
    """Scales that are integers times a power of two are multiplied as such; 256 channels with another one are not."""
    w = make(320, 600, scales=torch.float32)
    scales = w.wscales.to(torch.bfloat16).float()
    scales[300, 2] = spoil
    w = tk.quantize.SVDQWeight(w.qweight, scales, w.lora_down, w.lora_up, w.smooth, 320, "int4", "int8")
    bias = torch.randn(600)
    x = torch.randn(70, 320)
    y = tk.ops.svdq_linear(x, w, bias)
    assert_within_budget(y, truth(x, w, bias), same_precision(x, w, bias))
    for m in (1, 5, 6, 33):
        assert torch.equal(tk.ops.svdq_linear(x[:m], w, bias), y[:m])


@pytest.mark.parametrize("m", [1, 3, 6, 40])
def test_outliers_and_dead_tokens(m):
    w, bias = make(320, 70), torch.randn(70)
    x = torch.full((m, 320), 100.0)
    x[:, ::2] *= -1
    assert_within_budget(tk.ops.svdq_linear(x, w, bias), truth(x, w, bias), same_precision(x, w, bias))
    x[0] = 0
    assert torch.equal(tk.ops.svdq_linear(x, w, bias)[0], bias)


def test_extreme_codes_do_not_saturate():
    """The largest integers there are: |activation| 127, |code| 8 or 2 e2m1 = 12, all of one sign."""
    for format, byte, value in (("int4", 0x88, -8), ("int4", 0x77, 7), ("nvfp4", 0x77, 6), ("nvfp4", 0xFF, -6)):
        groups = 5 if format == "int4" else 20
        w = tk.quantize.SVDQWeight(
            torch.full((33, 160), byte, dtype=torch.uint8), torch.ones(33, groups), torch.zeros(1, 320),
            torch.zeros(33, 1), torch.ones(320), 320, format, "int8", None if format == "int4" else torch.ones(1))
        for m in (1, 2, 4, 7, 20):
            for sign in (1, -1):
                y = tk.ops.svdq_linear(torch.full((m, 320), 127.0 * sign), w)
                assert torch.equal(y, torch.full((m, 33), 127.0 * sign * value * 320)), (format, m)


def test_strides_and_margins():
    w, bias, x = make(200, 50), torch.randn(50), torch.randn(9, 200)
    y = tk.ops.svdq_linear(x, w, bias)
    for layout in (strided, poisoned):
        assert torch.equal(tk.ops.svdq_linear(layout(x), w, bias), y)
    copies = [poisoned(t) for t in (w.qweight, w.wscales, w.lora_down, w.lora_up, w.smooth)]
    moved = tk.quantize.SVDQWeight(*copies, 200, "int4", "int8")
    assert torch.equal(tk.ops.svdq_linear(poisoned(x), moved, poisoned(bias)), y)


def test_same_bits_for_any_threads():
    before = torch.get_num_threads()
    try:
        for m, k, n, group in ((1, 640, 300, 64), (7, 640, 300, 64), (200, 1100, 200, 64), (130, 96, 65, 32)):
            w, x = make(k, n, group=group), torch.randn(m, k)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(tk.ops.svdq_linear(x, w))
            assert all(torch.equal(results[0], r) for r in results), m
    finally:
        torch.set_num_threads(before)


def test_integers_of_long_rows():
    x = with_outliers(torch.randn(70, 1500), 100, 0.01)
    smooth, none = torch.rand(1500) + 0.5, torch.zeros(16, 1500)
    want, want_scales = activation_codes(reference.smoothed(x, smooth, 0.0), "int8", False)
    codes, scales, sums, down = torch.ops.triskele_native.svdq_quantize(x, smooth, none, 0.0, 64)
    natural = codes.unflatten(1, (-1, 2, 32)).transpose(-1, -2).flatten(1)[:, :1500]
    assert torch.equal(natural.float(), want.squeeze(1)) and torch.equal(scales, want_scales.squeeze(1))
    assert torch.equal(sums, codes.unflatten(1, (-1, 64)).sum(-1, dtype=torch.int32)) and not bool(down.any())


LEVEL_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_svdq_fast import level_results
torch.save(level_results(), sys.argv[1])
"""


def level_results():
    """Exact sums (scales of one, integer tokens) for the numbers of tokens that each path of a level starts at."""
    torch.manual_seed(3)
    w = make(320, 70, scales=torch.float32)
    exact = tk.quantize.SVDQWeight(w.qweight, torch.ones_like(w.wscales), torch.zeros(1, 320), torch.zeros(70, 1),
                                   torch.ones(320), 320, "int4", "int8")
    x = torch.randint(-127, 128, (33, 320)).float()
    x[:, 0] = 127
    return {m: tk.ops.svdq_linear(x[:m], exact) for m in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 33)}


def test_every_instruction_set_agrees_on_every_path(tmp_path):
    assert not _native.cpu_library(), _native.cpu_library()
    levels = kernels.levels()
    running = [subprocess.Popen(
        [sys.executable, "-c", LEVEL_SCRIPT, tmp_path / f"{level}.pt", os.path.dirname(__file__)],
        env={**os.environ, "TRISKELE_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}) for level in levels]
    assert [process.wait() for process in running] == [0] * len(levels)
    results = [torch.load(tmp_path / f"{level}.pt") for level in levels]
    for level, found in zip(levels, results):
        for m, y in found.items():
            assert torch.equal(y, results[0][33][:m]), (level, m)
