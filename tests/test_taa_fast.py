"""The vector kernels of the step: tails of rows and blocks, many past rounds, the small solve, the published peer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from generators import poisoned, with_outliers

from triskele import backend
from triskele.ops import taa_gamma, taa_residual, taa_update

BLOCK = 1024  # elements of a row that one thread takes at a time (csrc/cpu/taa.cpp)


def inputs(window, size, *, slots=1, lengths=None, state=torch.float32, eps=None, depth=1, seed=0, noisy=False):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    lengths = [max(window - q, 0) for q in range(slots)] if lengths is None else lengths
    return dict(
        x=normal(window + 1, size, dtype=state), eps=normal(window, size, dtype=eps or state),
        a=1 + 0.02 * torch.rand(window, generator=g, dtype=torch.float64), b=0.1 * normal(window, depth),
        c=0.1 * normal(window), noise=normal(window, size, dtype=state) if noisy else None,
        past_x=[normal(n, size, dtype=state) for n in lengths], past_r=[normal(n, size, dtype=state) for n in lengths],
        gamma=0.3 * normal(window, len(lengths)))


def exact(v):
    return {k: [t.double() for t in x] if isinstance(x, list) else None if x is None else x.double()
            for k, x in v.items()}


def residual(v, order=None, backend="cpu"):
    return taa_residual(v["x"], v["eps"], v["a"], v["b"], v["c"], noise=v["noise"], past_r=v["past_r"], order=order,
                        backend=backend)


def update(v, r, backend="cpu"):
    return taa_update(v["x"], r, v["gamma"], v["eps"], past_x=v["past_x"], past_r=v["past_r"], backend=backend)


def compare(v, order=None, what=""):
    state = v["x"].dtype
    want, got = residual(exact(v), order, "reference"), residual(v, order)
    eps = torch.finfo(state).eps
    for name, g, w in zip(("R", "squares", "gram", "rhs"), got, want):
        if w.numel():
            assert (g - w).abs().max() <= 64 * eps * max(1.0, float(w.abs().max())), (what, name)
    moved, truth = update(v, got[0]), update(exact(v), got[0].double(), "reference")
    assert moved.dtype == state
    assert (moved - truth).abs().max() <= 64 * eps * max(1.0, float(truth.abs().max())), what


@pytest.mark.parametrize("state,eps", [(torch.float32, torch.bfloat16), (torch.float64, torch.float64),
                                       (torch.float64, torch.bfloat16)])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 33, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 31])
def test_tails_of_rows_and_blocks(size, state, eps):
    for slots in (0, 1, 2, 4):
        for order in (None, 3):
            compare(inputs(7, size, slots=slots, state=state, eps=eps, depth=2, noisy=True), order, f"{slots} {order}")


@pytest.mark.parametrize("slots", [4, 5, 7])
def test_any_number_of_past_rounds(slots):
    """Up to four rounds of differences stay in registers, more go through memory."""
    compare(inputs(9, BLOCK + 77, slots=slots), what="falling lengths")
    compare(inputs(9, 130, slots=slots, lengths=[9] * 3 + [2] * (slots - 3)), 4, "two rows know them all")
    compare(inputs(9, 130, lengths=[6] * slots, slots=slots, state=torch.float64), 9)


def test_outliers_and_poisoned_margins():
    plain = inputs(12, 2 * BLOCK + 5, slots=5, eps=torch.bfloat16)
    plain["x"] = with_outliers(plain["x"], 1e4)
    want = residual(plain)
    v = {k: [poisoned(t) for t in x] if isinstance(x, list) else None if x is None else poisoned(x)
         for k, x in plain.items()}
    got = residual(v)
    assert all(torch.equal(g, w) for g, w in zip(got, want)) and all(g.isfinite().all() for g in got)
    assert torch.equal(update(v, got[0]), update(plain, want[0]))


def test_a_nan_stays_in_its_element_and_shows_in_its_rows_sums():
    v = inputs(6, 100, slots=1)
    clean = residual(v)
    v["eps"][2, 40] = float("nan")                       # row 2 and the rows below it see it
    r, squares, gram, _ = residual(v)
    bad = r.isnan()
    assert bad[:3, 40].all() and int(bad.sum()) == 3
    assert squares.isnan().tolist() == [False, False, True, False, False, False]
    assert torch.equal(r[3:], clean[0][3:]) and gram[:3].isnan().all() and not gram[3:].isnan().any()


def test_zero_weights_in_the_middle_and_at_the_end():
    v = inputs(5, 200, slots=3, lengths=[5, 5, 5], state=torch.float64)
    r = residual(v)[0]
    v["gamma"][:, 1] = 0
    assert torch.allclose(update(v, r), update(v, r, "reference"), atol=1e-13, rtol=0)
    v["gamma"][:, 1:] = 0                                # only the newest round is read
    want = update(v, r)
    for k in ("past_x", "past_r"):
        v[k][1][:], v[k][2][:] = float("nan"), float("inf")
    assert torch.equal(update(v, r), want)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("slots", [0, 1, 2, 3, 6])
def test_gamma_kernel_equals_the_reference(slots, relative):
    for seed in range(4):
        lengths = [max(min(10 - 2 * q + seed, 11), 0) for q in range(slots)]
        v = inputs(11, 90, slots=slots, lengths=lengths, state=torch.float64, seed=seed)
        _, squares, gram, rhs = residual(v)
        limits = torch.zeros(11, dtype=torch.float64)
        limits[seed + 6:] = 1e9
        arguments = (squares, gram, rhs, limits, lengths)
        got = taa_gamma(*arguments, ridge=1e-3, relative=relative, backend="cpu")
        want = taa_gamma(*arguments, ridge=1e-3, relative=relative, backend="reference")
        assert torch.equal(got[1], want[1]) and got[1].tolist() == [seed + 5]
        assert torch.allclose(got[0], want[0], rtol=1e-9, atol=1e-12)
        assert not got[0][seed + 5:].any()


def test_gamma_kernel_on_hostile_systems():
    ones, zero = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

    def gamma(gram, ridge=0.0, relative=True, squares=ones[:, 0], lengths=(4, 4)):
        return taa_gamma(squares, gram, ones, zero, list(lengths), ridge=ridge, relative=relative, backend="cpu")
    singular = torch.ones(4, 2, 2, dtype=torch.float64)
    assert not gamma(singular)[0].any()
    assert not gamma(torch.zeros_like(singular), 1e-3)[0].any()
    bad = torch.full_like(singular, float("nan"))
    assert not gamma(bad, 1e-3)[0].any()                              # a NaN takes the plain step, and is reported
    swapped = torch.tensor([[1e-300, 1.0], [1.0, 0.0]], dtype=torch.float64).expand(4, 2, 2) / 4
    assert gamma(swapped.contiguous())[0].isfinite().all()            # needs a row exchange
    assert gamma(singular, 1e-3, squares=zero)[1].tolist() == [0]     # all converged
    assert not gamma(singular, 1e-3, lengths=(0, 0))[0].any()         # no row has a past
    assert backend.explain("taa.gamma", zero, singular, ones, zero, [4, 4], 0.0, True).chosen == "cpu"


def test_gamma_native_op_guards_itself():
    ones, zero = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    native = torch.ops.triskele_native.taa_gamma
    with pytest.raises(RuntimeError, match="gram with a matrix of all slots a row"):
        native(zero, torch.zeros(4, 2, 3, dtype=torch.float64), ones, zero, [4, 4], 0.0, True)
    with pytest.raises(RuntimeError, match="lengths: expected 2, got 1"):
        native(zero, torch.zeros(4, 2, 2, dtype=torch.float64), ones, zero, [4], 0.0, True)


def test_bitwise_the_same_on_any_number_of_threads():
    v = inputs(40, 30 * BLOCK + 3, slots=2, eps=torch.bfloat16)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = residual(v)
            seen.append((*out, update(v, out[0])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_the_published_step_gives_the_same_window(memory):
    folder = str(Path(__file__).parent.parent / "bench")
    sys.path.insert(0, folder)
    try:
        peer = importlib.import_module("peers_taa")
    finally:
        sys.path.remove(folder)
    v = inputs(20, 300, slots=memory - 1, lengths=[20] * (memory - 1))
    limits = torch.full((20,), 1e-3**2 * 300, dtype=torch.float64)
    r, squares, gram, rhs = residual(v)
    v["gamma"], highest = taa_gamma(squares, gram, rhs, limits, [20] * (memory - 1), ridge=1e-3, relative=False)
    step = peer.published_step(v["a"], v["b"][:, 0], v["c"])
    published, top = step(v["x"], v["eps"], v["past_x"], v["past_r"])
    assert torch.equal(highest, top)
    v["noise"] = torch.zeros(20, 300)
    assert (update(v, r) - published).abs().max() <= 1e-5 and published.dtype == torch.float32
    assert peer.floor_bytes(100, 16384, 2) == 36 * 100 * 16384
