"""csrc/cuda/taa_*_sm80.cu, run thread by thread on the CPU: the float64 reference and published iterates."""

from __future__ import annotations

import itertools

import emulated
import pytest
import test_sampling
import torch
from conftest import vector_files
from generators import poisoned, with_outliers
from test_taa import DTYPES, doubled, inputs, residual_of, same_precision_residual, update_of
from tolerance import assert_within_budget

from triskele import _native, backend
from triskele.ops import taa_gamma
from triskele.ops.taa import backends


@pytest.fixture
def on_cuda(monkeypatch):
    """The step's ops run the emulated kernels where backend "cpu" is chosen, and refuse what the cuda entry refuses."""
    ops = emulated.load("taa_residual_sm80", "taa_gamma_sm80", "taa_update_sm80")
    for name in ("residual", "gamma", "update"):
        entries = {entry.name: entry for entry in backend.TABLES[f"taa.{name}"]}
        instead = backend.Backend("cpu", getattr(ops, f"taa_{name}"), why_not=entries["cuda"].why_not)
        monkeypatch.setitem(backend.TABLES, f"taa.{name}", (instead, entries["reference"]))


@pytest.mark.parametrize("state, eps", DTYPES)
@pytest.mark.parametrize("window, size", [(1, 1), (2, 131), (5, 128), (13, 260)])
def test_kernels_within_budget(state, eps, window, size, on_cuda):
    for order, depth, slots, above, noisy in [(1, 1, 0, 0, True), (3, 3, 1, 2, False), (5, 1, 3, 0, True),
                                              (30, 3, 2, 2, True), (2, 1, 4, 1, False)]:
        v = inputs(window, size, depth=depth, slots=slots, above=above, state=state, eps=eps, noisy=noisy)
        what = f"order {order} depth {depth} slots {slots} above {above}"
        exact = residual_of(doubled(v), order, "reference")
        got = residual_of(v, order, "cpu")
        assert_within_budget(got[0], exact[0], same_precision_residual(v, order), what=what,
                             floor=8 * torch.finfo(state).eps * max(1.0, float(exact[0].abs().max())))
        for name, g, e in zip(("squares", "gram", "rhs"), got[1:], exact[1:]):
            if e.numel():
                scale = max(1.0, float(e.abs().max()))
                assert (g - e).abs().max() <= 100 * torch.finfo(state).eps * scale, (what, name)
        moved, want = update_of(v, got[0], "cpu"), update_of(doubled(v), got[0].double(), "reference")
        assert moved.shape == want.shape and moved.dtype == state
        assert (moved - want).abs().max() <= 32 * torch.finfo(state).eps * max(1.0, float(want.abs().max())), what


def test_a_band_that_shared_memory_does_not_hold(on_cuda):
    v = inputs(70, 4, depth=60, slots=1, above=3)
    for order in (70, 7):
        exact, got = residual_of(doubled(v), order, "reference"), residual_of(v, order, "cpu")
        assert_within_budget(got[0], exact[0], same_precision_residual(v, order),
                             floor=1e-5 * float(exact[0].abs().max()))
        assert (got[1] - exact[1]).abs().max() <= 1e-4 * exact[1].abs().max()


@pytest.mark.parametrize("window, slots, relative", list(itertools.product((1, 8, 70), (0, 1, 4), (True, False))))
def test_gamma_of_the_reference(window, slots, relative, on_cuda):
    v = inputs(window, 16, slots=slots, state=torch.float64)
    _, squares, gram, rhs = residual_of(v, window, "reference")
    limits = torch.full((window,), 1e9, dtype=torch.float64)
    limits[window // 2] = 0
    lengths = [len(p) for p in v["past_r"]]
    for wanted in (limits, torch.zeros_like(limits), limits + 1e9):
        (gamma, highest), (want, top) = (taa_gamma(squares, gram, rhs, wanted, lengths, ridge=0.1, relative=relative,
                                                   backend=name) for name in ("cpu", "reference"))
        assert torch.equal(highest, top) and torch.allclose(gamma, want, atol=1e-10, rtol=1e-8)


def test_gamma_of_a_singular_system_is_zero(on_cuda):
    zero, ones = torch.zeros(4, 2, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    squares, limits = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for matrix, ridge, relative in ((zero, 0.0, True), (zero, 1e-3, True), (zero, 0.0, False), (zero + 1, 0.0, False)):
        gamma, highest = taa_gamma(squares, matrix, ones, limits, [4, 4], ridge=ridge, relative=relative, backend="cpu")
        assert highest.tolist() == [3] and not gamma.any()


def test_margins_outliers_and_any_order(on_cuda):
    plain = inputs(6, 700, depth=2, slots=2, above=1)
    plain["x"], plain["eps"] = with_outliers(plain["x"]), with_outliers(plain["eps"])
    want = residual_of(plain, 4, "cpu")
    moved = update_of(plain, want[0], "cpu")
    assert all(x.isfinite().all() for x in (*want, moved))
    v = {name: poisoned(value, 64) if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
    v["past_x"], v["past_r"] = ([poisoned(p) for p in plain[k]] for k in ("past_x", "past_r"))
    v["enter"] = tuple(poisoned(e) for e in plain["enter"])
    for order in ("forward", "backward", "random"):
        with emulated.order(order, 11):
            got = residual_of(v, 4, "cpu")
            assert all(torch.equal(g, w) for g, w in zip(got, want))
            assert torch.equal(update_of(v, got[0], "cpu"), moved)
    shifted = plain | {"x": poisoned(plain["x"], 1)}        # no 16-byte loads
    got = residual_of(shifted, 4, "cpu")
    assert torch.allclose(got[0], want[0], atol=1e-5 * float(want[0].abs().max()), rtol=0)


def test_rows_with_zero_gamma_do_not_read_their_past(on_cuda):
    v = inputs(5, 300, slots=1)
    r = residual_of(v, 5, "cpu")[0]
    v["gamma"][2:] = 0
    want = update_of(v, r, "cpu")
    v["past_x"][0][2:], v["past_r"][0][2:] = float("nan"), float("inf")
    got = update_of(v, r, "cpu")
    assert torch.equal(got[3 + 3:], want[3 + 3:])


@pytest.mark.parametrize("size", [0, 1])
def test_empty_latent(size, on_cuda):
    v = inputs(4, size, slots=1)
    r, squares, gram, rhs = residual_of(v, 2, "cpu")
    assert r.shape == (4, size) and update_of(v, r, "cpu").shape == (7, size)
    if size == 0:
        assert not squares.any() and not gram.any() and not rhs.any()


@pytest.mark.parametrize("path", vector_files("sampling", "conv_T25*"), ids=lambda p: p.stem)
def test_the_published_iterates(path, on_cuda):
    test_sampling.test_full_window_repeats_the_published_iterates(path)


def test_the_native_ops_guard_themselves():
    ops, v = emulated.load("taa_residual_sm80", "taa_update_sm80"), inputs(3, 8)
    with pytest.raises(RuntimeError, match="taa_residual"):
        ops.taa_residual(v["x"], v["eps"], None, v["a"][:2], v["b"], v["c"], [], 2)
    with pytest.raises(RuntimeError, match="eps in the dtype of x or bfloat16"):
        ops.taa_residual(v["x"], v["eps"].half(), None, v["a"], v["b"], v["c"], [], 2)
    with pytest.raises(RuntimeError, match="past_x and past_r with the same rows"):
        ops.taa_update(v["x"], torch.zeros(3, 8), [torch.zeros(1, 8)], [torch.zeros(2, 8)], v["gamma"], v["eps"],
                       *v["enter"])


@pytest.mark.parametrize("chip, sm80, sm90", [
    ((7, 5), ["needs compute capability 8.0 or later, got 7.5"], ["needs compute capability 9.0, got 7.5"]),
    ((8, 6), [], ["needs compute capability 9.0, got 8.6"]),
    ((9, 0), [], []),
    ((12, 0), [], ["needs compute capability 9.0, got 12.0"]),
])
def test_chips_that_the_kernels_do_not_run_on(chip, sm80, sm90, monkeypatch):
    monkeypatch.setattr(_native, "cuda_library", lambda: [])
    monkeypatch.setattr(_native, "_chip", lambda: chip)
    assert _native.cuda_sm80() == sm80 and _native.cuda_sm90() == sm90


def test_the_entries_say_why_not():
    v = inputs(3, 8)
    for op, arguments in (("taa.residual", (v["x"], v["eps"], None, v["a"], v["b"], v["c"], [], 3)),
                          ("taa.gamma", (v["a"], v["gamma"][..., None], v["gamma"], v["a"], [3], 1e-3, True))):
        assert backend.explain(op, *arguments).reasons["cuda"] == ["takes cuda tensors, got cpu"]
    many = [torch.zeros(3, 8)] * 5
    entry = {entry.name: entry for entry in backends.RESIDUAL}["cuda"]
    assert entry.why_not(v["x"], v["eps"], None, v["a"], v["b"], v["c"], many, 3) == ["takes memory up to 5, got 6"]
