"""The solver's step: residual, the small solve, update."""

from __future__ import annotations

import torch
from generators import with_outliers
from tolerance import assert_within_budget

from gpu.family import Case, Op
from triskele.ops.taa import reference

F32, F64, B16 = torch.float32, torch.float64, torch.bfloat16
GRID = [  # window, latent elements, multistep depth, slots, rows above, dtype of states, of eps
    (1, 1, 1, 0, 0, F32, F32), (2, 511, 1, 1, 0, F32, B16), (5, 512, 3, 2, 2, F32, F32), (13, 1300, 1, 1, 0, F64, F64),
    (13, 1300, 2, 3, 1, F64, B16), (31, 4096, 1, 4, 0, F32, B16), (8, 1025, 1, 0, 0, F32, F32)]
LARGE = [(100, 16384, 1, 1, 0, F32, B16), (50, 65536, 2, 2, 2, F32, F32)]
TOLERANCE = 32  # roundings of the states' dtype, of the largest value


def _values(at, seed):
    window, size, depth, slots, above, state, eps = at
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=F64):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    lengths = [max(window - 2 * slot - 1, 0) for slot in range(slots)]
    return dict(x=normal(window + 1, size, dtype=state), eps=normal(window + above, size, dtype=eps),
                noise=normal(window, size, dtype=state), a=1 + 0.1 * torch.rand(window, generator=generator, dtype=F64),
                b=0.1 * normal(window, depth), c=0.1 * normal(window),
                past_x=[normal(n, size, dtype=state) for n in lengths],
                past_r=[normal(n, size, dtype=state) for n in lengths], r=normal(window, size, dtype=state),
                gamma=normal(window, slots), lengths=lengths, enter_a=torch.rand(3, generator=generator, dtype=F64),
                enter_w=0.1 * normal(3, window + above), enter_c=normal(3), enter_noise=normal(3, size, dtype=state))


def _name(at, *traits):
    window, size, depth, slots, above, state, eps = at
    return ", ".join((f"{window}x{size}", f"depth {depth}", f"slots {slots}", f"above {above}", str(state)[6:],
                      f"eps {str(eps)[6:]}", *traits))


def _residual(at, order, noisy=True, outliers=False):
    def make(seed):
        v = _values(at, seed)
        x = with_outliers(v["x"], 1e3, 0.02) if outliers else v["x"]
        return (x, v["eps"], v["noise"] if noisy else None, v["a"], v["b"], v["c"], v["past_r"], order)

    return Case(_name(at, f"order {order}", *(["no noise"] if not noisy else []), *(["outliers"] if outliers else [])),
                make, medium=at in LARGE, thorough=at in GRID[1:5:2] and order > 1)


def compare_residual(arguments, got, exact):
    x = arguments[0]
    assert got[0].dtype == x.dtype and all(t.dtype == F64 for t in got[1:])
    eps = torch.finfo(x.dtype).eps
    scale = max(1.0, float(exact[0].abs().max()), float(x.abs().max()))
    assert_within_budget(got[0], exact[0], exact[0].to(x.dtype), floor=TOLERANCE * eps * scale, what="R")
    for name, a, e in zip(("squares", "gram", "rhs"), got[1:], exact[1:]):
        if e.numel():
            floor = 100 * eps * max(1.0, float(exact[1].abs().max()), float(e.abs().max()))
            assert_within_budget(a, e, e, floor=floor, what=name)


RESIDUAL = Op("taa.residual", "taa_residual", (
    *(_residual(at, order) for at in GRID for order in sorted({1, 3, at[0]})), _residual(GRID[1], 2, noisy=False),
    _residual(GRID[4], 13, outliers=True), *(_residual(at, at[0]) for at in LARGE), _residual(LARGE[1], 8),
), compare_residual)


def _update(at, enter=3, noisy=True):
    def make(seed):
        v = _values(at, seed)
        return (v["x"], v["r"], v["past_x"], v["past_r"], v["gamma"], v["eps"], v["enter_a"][:enter],
                v["enter_w"][:enter], v["enter_c"][:enter], v["enter_noise"][:enter] if noisy and enter else None)

    return Case(_name(at, f"{enter} enter", *(["no noise"] if not noisy else [])), make, medium=at in LARGE,
                thorough=at in GRID[1:5:2])


def compare_update(arguments, got, exact):
    x = arguments[0]
    assert got[0].dtype == x.dtype
    floor = TOLERANCE * torch.finfo(x.dtype).eps * max(1.0, float(exact[0].abs().max()))
    assert_within_budget(got[0], exact[0], exact[0].to(x.dtype), floor=floor, what="x")


UPDATE = Op("taa.update", "taa_update", (
    *(_update(at, enter) for at in GRID for enter in (0, 3)), _update(GRID[2], noisy=False),
    *(_update(at) for at in LARGE)), compare_update)


def _gamma(at, relative, converged=0.5):
    def make(seed):
        v = _values(at, seed)
        known = (v[name] for name in ("x", "eps", "noise", "a", "b", "c", "past_r"))
        _, squares, gram, rhs = reference.residual(*known, at[0])
        limits = torch.full_like(squares, float(squares.quantile(converged)) if converged < 1 else float("inf"))
        return squares, gram, rhs, limits, v["lengths"], 1e-3, relative

    return Case(_name(at, "relative" if relative else "absolute", f"{converged:.0%} converged"), make,
                medium=at in LARGE, thorough=at in GRID[1:5:2])


def compare_gamma(arguments, got, exact):
    assert torch.equal(got[1], exact[1]), f"highest: {got[1].tolist()}, want {exact[1].tolist()}"
    if exact[0].numel():
        floor = 1e-8 * max(1.0, float(exact[0].abs().max()))
        assert_within_budget(got[0], exact[0], exact[0], floor=floor, what="gamma")


GAMMA = Op("taa.gamma", "taa_gamma", (
    *(_gamma(at, relative) for at in GRID for relative in (True, False)), _gamma(GRID[5], True, 0.0),
    _gamma(GRID[5], True, 1.0), _gamma(LARGE[0], True)), compare_gamma)

OPS = (RESIDUAL, GAMMA, UPDATE)
