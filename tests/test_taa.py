"""The fused step's ops: kernels against the float64 reference, and against the formula written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from generators import poisoned, strided, with_outliers
from tolerance import assert_within_budget

from triskele import _native, backend
from triskele.ops import taa_gamma, taa_residual, taa_update
from triskele.ops.taa import backends, reference

DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64),
          (torch.float64, torch.bfloat16)]


def inputs(window, size, *, depth=1, slots=1, above=0, state=torch.float32, eps=None, seed=0, noisy=True, enter=3):
    """Random arguments of both passes, in float64 values that `state` and `eps` hold exactly."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    lengths = [max(window - 2 * q - 1, 0) for q in range(slots)]
    return dict(
        x=normal(window + 1, size, dtype=state), eps=normal(window + above, size, dtype=eps or state),
        a=1 + 0.1 * torch.rand(window, generator=g, dtype=torch.float64), b=0.1 * normal(window, depth),
        c=0.1 * normal(window), noise=normal(window, size, dtype=state) if noisy else None,
        past_x=[normal(n, size, dtype=state) for n in lengths], past_r=[normal(n, size, dtype=state) for n in lengths],
        gamma=normal(window, slots),
        enter=(torch.rand(enter, generator=g, dtype=torch.float64), 0.1 * normal(enter, window + above), normal(enter),
               normal(enter, size, dtype=state) if noisy else None))


def residual_of(v, order, backend="auto"):
    return taa_residual(v["x"], v["eps"], v["a"], v["b"], v["c"], noise=v["noise"], past_r=v["past_r"], order=order,
                        backend=backend)


def update_of(v, r, backend="auto"):
    return taa_update(v["x"], r, v["gamma"], v["eps"], past_x=v["past_x"], past_r=v["past_r"], enter=v["enter"],
                      backend=backend)


def doubled(v):
    """The same arguments with float64 tensors: the reference's exact answer."""
    def one(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        if isinstance(value, (list, tuple)):
            return type(value)(one(x) for x in value)
        return value
    return {name: one(value) for name, value in v.items()}


def same_precision_residual(v, order):
    """The formula in the state's dtype, in torch: what rounding alone costs."""
    x, eps, dtype = v["x"], v["eps"].to(v["x"].dtype), v["x"].dtype
    a, b, c = (v[k].to(dtype) for k in "abc")
    first = a[:, None] * x[1:]
    for d in range(b.shape[1]):
        rows = min(len(a), len(eps) - d)
        first[:rows] += b[:rows, d, None] * eps[d:d + rows]
    if v["noise"] is not None:
        first = first + c[:, None] * v["noise"]
    first = first - x[:-1]
    out = torch.zeros_like(first)
    for t in range(len(a)):
        reach = torch.ones((), dtype=dtype)
        for s in range(t, min(t + order, len(a))):
            out[t] += reach * first[s]
            reach = reach * a[s]
    return out


def test_reference_is_the_unrolled_equation():
    """R_t = (a_t … a_{e-1}) x_e + Σ (a_t … a_{s-1}) (b ε + c ξ)_s - x_t, with e = min(t + order, W)."""
    v = inputs(7, 5, depth=2, above=1, state=torch.float64)
    for order in (1, 3, 7, 20):
        r = residual_of(v, order, "reference")[0]
        for t in range(7):
            end, reach, want = min(t + order, 7), 1.0, -v["x"][t]
            for s in range(t, end):
                drive = v["b"][s, 0] * v["eps"][s] + v["b"][s, 1] * v["eps"][s + 1] + v["c"][s] * v["noise"][s]
                want = want + reach * drive
                reach = reach * v["a"][s]
            assert torch.allclose(r[t], want + reach * v["x"][end], atol=1e-12, rtol=0)


@pytest.mark.parametrize("state,eps", DTYPES)
@pytest.mark.parametrize("window,size", [(1, 1), (2, 511), (5, 512), (13, 1300)])
def test_kernel_within_budget(state, eps, window, size):
    for order, depth, slots, above, noisy in itertools.product((1, 3, 5, 30), (1, 3), (0, 1, 3), (0, 2), (True, False)):
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


def test_partials_are_products_of_differences():
    v = inputs(6, 40, slots=2, state=torch.float64)
    r, squares, gram, rhs = residual_of(v, 6)
    first = residual_of(v, 1)[0]
    assert torch.allclose(squares, (first**2).sum(1))
    newest, older = v["past_r"]
    for t in range(6):
        d = [r[t] - newest[t - 1] if t >= 1 else None, newest[t - 1] - older[t - 3] if t >= 3 else None]
        for i, j in itertools.product(range(2), range(2)):
            want = 0.0 if d[i] is None or d[j] is None else float(d[i] @ d[j])
            assert abs(float(gram[t, i, j]) - want) < 1e-10
        for i in range(2):
            assert abs(float(rhs[t, i]) - (0.0 if d[i] is None else float(d[i] @ r[t]))) < 1e-10


@pytest.mark.parametrize("relative", [True, False])
def test_gamma_is_the_ridge_solution_of_the_suffix_sums(relative):
    v = inputs(8, 64, slots=2, state=torch.float64)
    _, squares, gram, rhs = residual_of(v, 8)
    limits = torch.full((8,), 1e9, dtype=torch.float64)
    limits[[2, 6]] = 0
    lengths = [len(p) for p in v["past_r"]]                          # 7 and 5
    gamma, highest = taa_gamma(squares, gram, rhs, limits, lengths, ridge=0.1, relative=relative)
    assert highest.tolist() == [6]
    for t in range(8):
        count = sum(t >= 8 - n for n in lengths)
        want = torch.zeros(2, dtype=torch.float64)
        if count and t < 6:
            total = gram[t:, :count, :count].sum(0)
            ridge = 0.1 * total.diagonal().mean() if relative else 0.1
            want[:count] = torch.linalg.solve(total + ridge * torch.eye(count), rhs[t:, :count].sum(0))
        assert torch.allclose(gamma[t], want, atol=1e-10, rtol=1e-8), t


def test_gamma_of_a_singular_system_is_zero():
    zero = torch.zeros(4, 2, 2, dtype=torch.float64)
    ones = torch.ones(4, 2, dtype=torch.float64)
    squares, limits = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for ridge, relative in ((0.0, True), (1e-3, True), (0.0, False)):
        gamma, highest = taa_gamma(squares, zero, ones, limits, [4, 4], ridge=ridge, relative=relative)
        assert highest.tolist() == [3] and not gamma.any()
    same = torch.ones(4, 2, 2, dtype=torch.float64)                  # rank one, no ridge
    assert not taa_gamma(squares, same, ones, limits, [4, 4], ridge=0.0)[0].any()
    assert taa_gamma(limits, same, ones, limits, [4, 4])[1].tolist() == [0]           # all converged


def test_strides_margins_and_outliers():
    plain = inputs(6, 700, depth=2, slots=2, above=1)
    plain["x"], plain["eps"] = with_outliers(plain["x"]), with_outliers(plain["eps"])
    want = residual_of(plain, 4)
    moved = update_of(plain, want[0])
    for change in (strided, poisoned):
        v = {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
        v["past_x"], v["past_r"] = ([change(p) for p in plain[k]] for k in ("past_x", "past_r"))
        v["enter"] = tuple(change(e) for e in plain["enter"])
        got = residual_of(v, 4)
        assert all(torch.equal(g, w) for g, w in zip(got, want))
        assert torch.equal(update_of(v, got[0]), moved)


def test_rows_with_zero_gamma_do_not_read_their_past():
    v = inputs(5, 300, slots=1)
    r = residual_of(v, 5)[0]
    v["gamma"][2:] = 0
    want = update_of(v, r)
    v["past_x"][0][2:], v["past_r"][0][2:] = float("nan"), float("inf")
    got = update_of(v, r)
    assert torch.equal(got[3 + 3:], want[3 + 3:])


@pytest.mark.parametrize("size", [0, 1])
def test_empty_latent(size):
    v = inputs(4, size, slots=1)
    r, squares, gram, rhs = residual_of(v, 2)
    assert r.shape == (4, size) and update_of(v, r).shape == (7, size)
    if size == 0:
        assert not squares.any() and not gram.any() and not rhs.any()


def test_bitwise_the_same_on_any_number_of_threads():
    v = inputs(20, 40_000, slots=2)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = residual_of(v, 7)
            seen.append((*out, update_of(v, out[0])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


@pytest.mark.parametrize("wanted", ["cpu", "reference"])
def test_opcheck(wanted):
    v = inputs(4, 33, depth=2, slots=2, above=1)
    arguments = (v["x"], v["eps"], v["noise"], v["a"], v["b"], v["c"], v["past_r"], 3, wanted)
    r, squares, gram, rhs = torch.ops.triskele.taa_residual(*arguments)
    torch.library.opcheck(torch.ops.triskele.taa_residual, arguments)
    torch.library.opcheck(torch.ops.triskele.taa_gamma,
                          (squares, gram, rhs, torch.zeros_like(squares), [3, 1], 1e-3, True, wanted))
    torch.library.opcheck(torch.ops.triskele.taa_update, (v["x"], r, v["past_x"], v["past_r"], v["gamma"], v["eps"],
                                                          *v["enter"], wanted))
    none = (v["x"], v["eps"], None, v["a"], v["b"], v["c"], [], 3, wanted)
    torch.library.opcheck(torch.ops.triskele.taa_residual, none)


def test_compiles_without_a_graph_break():
    v = inputs(4, 33, slots=1)

    def round_of(x, eps):
        r, squares, gram, rhs = taa_residual(x, eps, v["a"], v["b"], v["c"], noise=v["noise"], past_r=v["past_r"])
        gamma, _ = taa_gamma(squares, gram, rhs, torch.zeros_like(squares), [len(v["past_r"][0])])
        return taa_update(x, r, gamma, eps, past_x=v["past_x"], past_r=v["past_r"], enter=v["enter"])
    compiled = torch.compile(round_of, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(v["x"], v["eps"]), round_of(v["x"], v["eps"]))


def test_auto_takes_the_kernel_and_says_what_it_refuses():
    v = inputs(3, 8)
    arguments = (v["x"], v["eps"], None, v["a"], v["b"], v["c"], [], 3)
    assert backend.explain("taa.residual", *arguments).chosen == "cpu"
    half = (v["x"], v["eps"].half(), *arguments[2:])
    choice = backend.explain("taa.residual", *half)
    assert choice.chosen is None and "bfloat16, got torch.float16" in choice.reasons["cpu"][0]
    assert [b.name for b in backends.RESIDUAL][-1] == "reference"


@pytest.mark.parametrize("change,match", [
    (dict(x=torch.zeros(1, 8)), "x: expected at least one target and the anchor, got 1 rows"),
    (dict(x=torch.zeros(8)), "x: expected 2 dimensions"),
    (dict(x=torch.zeros(4, 8).long()), "x: expected a floating-point dtype"),
    (dict(eps=torch.zeros(2, 8)), r"eps: expected shape \[3 or more, 8\], got \[2, 8\]"),
    (dict(eps=torch.zeros(3, 9)), r"eps: expected shape \[3 or more, 8\]"),
    (dict(a=torch.zeros(4).double()), r"a: expected shape \[3\], got \[4\]"),
    (dict(a=torch.zeros(3)), "a: expected float64, got torch.float32"),
    (dict(b=torch.zeros(3).double()), r"b: expected shape \[3, any\]"),
    (dict(c=None), "c: expected a tensor, got NoneType"),
    (dict(noise=torch.zeros(4, 8)), r"noise: expected shape \[3, 8\]"),
    (dict(noise=torch.zeros(3, 8).double()), "noise: expected the dtype of x"),
    (dict(past_r=[torch.zeros(4, 8)]), "past_r: expected shape"),
    (dict(past_r=[torch.zeros(1, 8), torch.zeros(2, 8)]), "rows never more than in the newer round"),
])
def test_bad_residual_arguments(change, match):
    v = {**inputs(3, 8), **change}
    with pytest.raises(ValueError, match=match):
        residual_of(v, 2)


@pytest.mark.parametrize("change,match", [
    (dict(gamma=torch.zeros(3, 2).double()), r"gamma: expected shape \[3, 1\]"),
    (dict(past_x=[]), r"past_x: expected the rows of past_r \(\[2\]\), got \[\]"),
    (dict(enter=(torch.zeros(2).double(), torch.zeros(2, 2).double(), torch.zeros(2).double(), None)), "enter w:"),
    (dict(enter=(torch.zeros(2).double(), torch.zeros(2, 3).double(), torch.zeros(3).double(), None)), "enter c:"),
    (dict(enter=(torch.zeros(2).double(), torch.zeros(2, 3).double(), torch.zeros(2).double(), torch.zeros(3, 8))),
     "enter noise:"),
])
def test_bad_update_arguments(change, match):
    v = {**inputs(3, 8), **change}
    with pytest.raises(ValueError, match=match):
        update_of(v, torch.zeros(3, 8))


def test_bad_order_residual_gamma_and_backend():
    v = inputs(3, 8)
    with pytest.raises(ValueError, match="order: expected an integer >= 1, got 0"):
        residual_of(v, 0)
    with pytest.raises(ValueError, match=r"residual: expected shape \[3, 8\]"):
        update_of(v, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        residual_of(v, 1, "gpu")
    _, squares, gram, rhs = residual_of(v, 3)
    with pytest.raises(ValueError, match=r"lengths: expected 1 numbers in \[0, 3\], got \[4\]"):
        taa_gamma(squares, gram, rhs, squares, [4])
    with pytest.raises(ValueError, match="ridge: expected a number >= 0"):
        taa_gamma(squares, gram, rhs, squares, [3], ridge=-1)
    with pytest.raises(ValueError, match="squares: expected float64"):
        taa_gamma(squares.float(), gram, rhs, squares, [3])


def test_the_native_op_guards_itself():
    """A caller who skips the public function gets an error, not a crash."""
    assert _native.cpu_library() == []
    v = inputs(3, 8)
    with pytest.raises(RuntimeError, match="taa_residual"):
        torch.ops.triskele_native.taa_residual(v["x"], v["eps"], None, v["a"][:2], v["b"], v["c"], [], 2)
    with pytest.raises(RuntimeError, match="eps in the dtype of x or bfloat16"):
        torch.ops.triskele_native.taa_residual(v["x"], v["eps"].half(), None, v["a"], v["b"], v["c"], [], 2)
    with pytest.raises(RuntimeError, match="past_x and past_r with the same rows"):
        torch.ops.triskele_native.taa_update(v["x"], torch.zeros(3, 8), [torch.zeros(1, 8)], [torch.zeros(2, 8)],
                                             v["gamma"], v["eps"], *v["enter"])


def test_reference_keeps_the_dtype_of_the_state():
    v = inputs(4, 16, slots=1)
    r, *_ = reference.residual(v["x"], v["eps"], v["noise"], v["a"], v["b"], v["c"], v["past_r"], 2)
    assert r.dtype == torch.float32


@pytest.mark.parametrize("state, eps", DTYPES, ids=str)
def test_results_that_go_past_the_caches(state, eps):
    """R and the moved window of more than 4 MiB are stored otherwise; the columns are those of a narrower window."""
    window, size = 5, 1 << 18
    whole = inputs(window, size, slots=2, state=state, eps=eps)
    r = residual_of(whole, window)[0]
    moved = update_of(whole, r)
    assert r.numel() * r.element_size() >= 4 << 20

    def columns(value):
        if isinstance(value, (list, tuple)):
            return type(value)(columns(part) for part in value)
        return value[:, -4096:] if value is not None and value.dim() == 2 and value.shape[1] == size else value
    part = {name: columns(value) for name, value in whole.items()}
    narrow = residual_of(part, window)[0]
    assert torch.equal(r[:, -4096:], narrow) and torch.equal(moved[:, -4096:], update_of(part, narrow))
