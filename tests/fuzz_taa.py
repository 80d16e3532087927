"""Fuzz cases of the solver step: both passes over the window, and the small solve."""

from __future__ import annotations

import torch
from fuzz_draw import Draw
from tolerance import assert_within_budget

from triskele.ops import taa_gamma, taa_residual, taa_update

WEIGHTS = torch.float64


def _window(draw: Draw):
    """x, eps and the past rounds' rows, newest first."""
    state = draw.choice("state", (torch.float32, torch.float64))
    eps_dtype = draw.choice("eps dtype", (state, torch.bfloat16))
    window, size = draw.size("W", 40), draw.size("N", draw.random.choice((20, 700, 3000)), low=0)
    above = draw.random.choice((0, 0, 1, 3))
    lengths, most = [], window
    for _ in range(draw.choice("slots", (0, 1, 1, 2, 3, 5))):
        most = draw.random.randint(0, most)
        lengths.append(most)
    draw.facts["lengths"] = lengths
    x = draw.tensor("x", window + 1, size, dtype=state)
    eps = draw.tensor("eps", window + above, size, dtype=eps_dtype)
    pasts = [[draw.tensor(f"past_{n}{i}", rows, size, dtype=state) for i, rows in enumerate(lengths)] for n in "xr"]
    return state, x, eps, pasts, lengths


def _doubled(value):
    if isinstance(value, (list, tuple)):
        return type(value)(_doubled(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) else value


def residual(draw: Draw) -> None:
    state, x, eps, (_, past_r), _ = _window(draw)
    window, size = x.shape[0] - 1, x.shape[1]
    depth = draw.random.choice((1, 1, 2, 3))
    a = 1 + draw.tensor("a", window, dtype=WEIGHTS, scale=0.05)
    b = draw.tensor("b", window, depth, dtype=WEIGHTS, scale=0.1)
    c = draw.tensor("c", window, dtype=WEIGHTS, scale=0.1)
    noise = draw.tensor("noise", window, size, dtype=state) if draw.flag("noisy") else None
    order = draw.choice("order", (None, 1, 2, max(1, window // 2), window, window + 7))
    got = taa_residual(x, eps, a, b, c, noise=noise, past_r=past_r, order=order, backend="cpu")
    want = taa_residual(*_doubled((x, eps, a, b, c)), noise=_doubled(noise), past_r=_doubled(past_r), order=order,
                        backend="reference")
    precision = torch.finfo(state).eps
    for name, g, w in zip(("R", "squares", "gram", "rhs"), got, want):
        assert g.dtype == (state if name == "R" else torch.float64)
        # a sum over up to `order` rows, each of terms larger than what is left
        grown = max([1.0, *(float(t.abs().max()) for t in (w, x if name == "R" else w) if t.numel())])
        grown *= 1 if name == "R" else 10
        assert_within_budget(g, w, w, what=name, floor=16 * precision * grown * max(1, window) ** 0.5)


def update(draw: Draw) -> None:
    state, x, eps, (past_x, past_r), lengths = _window(draw)
    window, size = x.shape[0] - 1, x.shape[1]
    r = draw.tensor("R", window, size, dtype=state)
    gamma = draw.tensor("gamma", window, len(lengths), dtype=WEIGHTS, scale=0.3)
    enter = None
    if draw.flag("enters"):
        count = draw.size("entering", 6, low=0)
        enter = (draw.tensor("enter a", count, dtype=WEIGHTS),
                 draw.tensor("enter w", count, eps.shape[0], dtype=WEIGHTS, scale=0.1),
                 draw.tensor("enter c", count, dtype=WEIGHTS),
                 draw.tensor("enter noise", count, size, dtype=state) if draw.flag("enter noisy") else None)
    call = dict(past_x=past_x, past_r=past_r, enter=enter)
    got = taa_update(x, r, gamma, eps, **call, backend="cpu")
    want = taa_update(*_doubled((x, r, gamma, eps)), **{k: _doubled(v) for k, v in call.items()}, backend="reference")
    assert got.dtype == state
    grown = max(1.0, float(want.abs().max()) if want.numel() else 0.0)
    assert_within_budget(got, want, want, what="x", floor=64 * torch.finfo(state).eps * grown)


def gamma(draw: Draw) -> None:
    """Against numbers that are not rounded: both sides are float64, so only the order of the sums differs."""
    window, slots = draw.size("W", 60), draw.choice("slots", (0, 1, 2, 3, 5))
    rows = draw.values(window, slots, 12)
    gram = rows @ rows.mT
    rhs = draw.tensor("rhs", window, slots, dtype=WEIGHTS)
    squares, limits = draw.tensor("squares", window, dtype=WEIGHTS), draw.tensor("limits", window, dtype=WEIGHTS)
    lengths, most = [], window
    for _ in range(slots):
        most = draw.random.randint(0, most)
        lengths.append(most)
    setting = dict(ridge=draw.choice("ridge", (1e-3, 0.1)), relative=draw.flag("relative"))
    got = taa_gamma(squares, gram, rhs, limits, lengths, **setting, backend="cpu")
    want = taa_gamma(squares, gram, rhs, limits, lengths, **setting, backend="reference")
    assert torch.equal(got[1], want[1]), "highest"
    largest = max(1.0, float(want[0].abs().max()) if want[0].numel() else 0.0)
    assert_within_budget(got[0], want[0], want[0], what="gamma", floor=1e-6 * largest)


CASES = {"taa.residual": residual, "taa.update": update, "taa.gamma": gamma}
