"""The fused step's Triton kernels in the interpreter, on CPU tensors. Run by test_triton_taa.py, in a process of
its own."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from conftest import VECTORS, Vectors
from generators import poisoned, with_outliers
from test_sampling import denoiser_of, published, system_of
from test_taa import doubled, inputs, same_precision_residual
from tolerance import assert_within_budget

from triskele import backend
from triskele.ops.taa import reference, triton_backend
from triskele.sampling import solve


def residual_of(v, order, run=triton_backend.residual):
    return run(v["x"], v["eps"], v["noise"], v["a"], v["b"], v["c"], v["past_r"], order)


def update_of(v, r, run=triton_backend.update):
    return run(v["x"], r, v["past_x"], v["past_r"], v["gamma"], v["eps"], *v["enter"])


@pytest.mark.parametrize("state, eps", [(torch.float32, torch.float32), (torch.float64, torch.float64)], ids=str)
@pytest.mark.parametrize("window, size", [(1, 1), (2, 64), (11, 67)])
def test_both_passes_within_budget(window, size, state, eps):
    draws = zip((1, 3, 5, 30), (1, 3, 1, 2), (0, 2, 1, 4), (0, 2, 1, 0), (True, False, True, True))
    for order, depth, slots, above, noisy in draws:
        v = inputs(window, size, depth=depth, slots=slots, above=above, state=state, eps=eps, noisy=noisy)
        what = f"order {order} depth {depth} slots {slots} above {above}"
        exact, got = residual_of(doubled(v), order, reference.residual), residual_of(v, order)
        assert_within_budget(got[0], exact[0], same_precision_residual(v, order), what=what,
                             floor=8 * torch.finfo(state).eps * max(1.0, float(exact[0].abs().max())))
        for name, g, e in zip(("squares", "gram", "rhs"), got[1:], exact[1:]):
            assert g.shape == e.shape and g.dtype == torch.float64
            if e.numel():
                scale = max(1.0, float(e.abs().max()))
                assert (g - e).abs().max() <= 100 * torch.finfo(state).eps * scale, (what, name)
        moved, want = update_of(v, got[0]), update_of(doubled(v), got[0].double(), reference.update)
        assert moved.shape == want.shape and moved.dtype == state
        assert (moved - want).abs().max() <= 32 * torch.finfo(state).eps * max(1.0, float(want.abs().max())), what


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("window, slots", [(8, 2), (5, 0), (150, 4), (3, 1)])
def test_gamma_is_the_references(window, slots, relative):
    v = inputs(window, 40, slots=slots, state=torch.float64)
    _, squares, gram, rhs = residual_of(v, window, reference.residual)
    limits = squares + torch.where(torch.arange(window) % 7 == 2, -1.0, 1.0)
    lengths = [len(p) for p in v["past_r"]]
    got = triton_backend.gamma(squares, gram, rhs, limits, lengths, 0.1, relative)
    want = reference.gamma(squares, gram, rhs, limits, lengths, 0.1, relative)
    assert torch.equal(got[1], want[1]) and got[0].shape == want[0].shape
    assert torch.allclose(got[0], want[0], atol=1e-10, rtol=1e-8)
    assert slots == 0 or window < 4 or want[0].any()


def test_gamma_of_a_singular_system_is_zero():
    zero, ones = torch.zeros(4, 2, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    squares, limits = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for ridge, relative in ((0.0, True), (1e-3, True), (0.0, False)):
        gamma, highest = triton_backend.gamma(squares, zero, ones, limits, [4, 4], ridge, relative)
        assert highest.tolist() == [3] and not gamma.any()
    same = torch.ones(4, 2, 2, dtype=torch.float64)  # rank one, no ridge
    assert not triton_backend.gamma(squares, same, ones, limits, [4, 4], 0.0, True)[0].any()
    assert triton_backend.gamma(limits, same, ones, limits, [4, 4], 1e-3, True)[1].tolist() == [0]  # all converged
    broken = ones.clone()
    broken[3, 0] = float("nan")
    assert not triton_backend.gamma(squares, same, broken, limits, [4, 4], 1e-3, True)[0].any()


def test_margins_and_outliers():
    plain = inputs(6, 100, depth=2, slots=2, above=1)
    plain["x"], plain["eps"] = with_outliers(plain["x"]), with_outliers(plain["eps"])
    want = residual_of(plain, 4)
    moved = update_of(plain, want[0])
    v = {name: poisoned(value) if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
    v["past_x"], v["past_r"] = ([poisoned(p) for p in plain[k]] for k in ("past_x", "past_r"))
    v["enter"] = tuple(poisoned(e) for e in plain["enter"])
    got = residual_of(v, 4)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    assert torch.equal(update_of(v, got[0]), moved) and moved.isfinite().all()


def test_what_has_weight_zero_is_not_read():
    v = inputs(5, 100, slots=2, above=2, depth=2)
    v["b"][:, 1], v["c"][3] = 0, 0
    v["enter"][1][:, 5:] = 0
    v["enter"][2][1] = 0
    clean = residual_of(v, 5)
    v["gamma"][2:] = 0
    moved = update_of(v, clean[0])
    bad = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in v.items()}
    bad["noise"][3], bad["eps"][5:] = float("nan"), float("inf")
    bad["enter"] = tuple(e.clone() for e in v["enter"])
    bad["enter"][3][1] = float("nan")
    bad["past_x"], bad["past_r"] = ([p.clone() for p in v[k]] for k in ("past_x", "past_r"))
    assert all(torch.equal(g, w) for g, w in zip(residual_of(bad, 5), clean))
    bad["past_x"][0][1:], bad["past_r"][0][1:] = float("nan"), float("inf")  # rows 2 and up
    assert torch.equal(update_of(bad, clean[0]), moved)


def test_empty_latent():
    v = inputs(4, 0, slots=1)
    r, squares, gram, rhs = residual_of(v, 2)
    assert r.shape == (4, 0) and update_of(v, r).shape == (7, 0)
    assert not squares.any() and not gram.any() and not rhs.any()


def test_elements_do_not_see_each_other():
    """An element's result is the same wherever it stands in the latent."""
    v = inputs(9, 130, slots=2, depth=2)
    r = residual_of(v, 9)[0]
    moved = update_of(v, r)
    cut = {name: value[:, 70:] if name in ("x", "eps", "noise") else value for name, value in v.items()}
    cut["past_x"], cut["past_r"] = ([p[:, 70:].contiguous() for p in v[k]] for k in ("past_x", "past_r"))
    cut["enter"] = (*v["enter"][:3], v["enter"][3][:, 70:].contiguous())
    cut = {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in cut.items()}
    assert torch.equal(residual_of(cut, 9)[0], r[:, 70:])
    assert torch.equal(update_of(cut, r[:, 70:].contiguous()), moved[:, 70:])


@pytest.mark.parametrize("order", [1, 7, 8, 20])
def test_order_of_every_length(order):
    for window in (8, 17):
        v = inputs(window, 3, state=torch.float64, slots=1)
        got, want = residual_of(v, order), residual_of(v, order, reference.residual)
        for g, w in itertools.zip_longest(got, want):
            assert torch.allclose(g, w, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name, run, state", [("gmm_T25_eta0", "w25_k25_m3", torch.float32),
                                              ("conv_T25_eta0", "w25_k8_m2", torch.float64)])
def test_published_runs(name, run, state, monkeypatch):
    """The whole iteration on these kernels takes the published rounds to the published sample."""
    for op in ("residual", "update", "gamma"):
        table = (backend.Backend("cpu", getattr(triton_backend, op)),)
        monkeypatch.setitem(backend.TABLES, f"taa.{op}", table)
    v = Vectors(VECTORS / "sampling" / f"{name}.safetensors")
    settings = json.loads(v.metadata["runs"])[run]
    result = solve(denoiser_of(v), system_of(v), v["noise"].to(state), **published(v, settings))
    assert abs(result.iterations - settings["n_iter"]) <= (0 if state == torch.float64 else 1)
    tolerance = 1e-8 if state == torch.float64 else 1e-4
    assert (result.samples[0] - v[f"{run}.traj_final"][0]).abs().max() <= tolerance
