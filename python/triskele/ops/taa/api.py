"""The two passes of a solver step over its window, and the small solve between them.

Shapes shared by all three. W: targets in the window; row 0 is the lowest one, state i0. N: elements of a latent.
E >= W: rows of ε; row j belongs to state i0 + 1 + j, rows from W on to final states above (multistep samplers).
Past rounds: a list, newest first; entry q holds rows W - n_q … W-1 of that round (the rows that were in the window then
and are now), n_0 >= n_1 >= …
"""

from __future__ import annotations

import torch

from triskele.checks import check_int, check_same, check_shape, check_tensor, expected
from triskele.ops.taa import op

Pasts = list[torch.Tensor]


def taa_residual(x: torch.Tensor, eps: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *,
                 noise: torch.Tensor | None = None, past_r: Pasts = (), order: int | None = None,
                 backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """R_t = r_t + a_t r_{t+1} + a_t a_{t+1} r_{t+2} + … (order terms), r_t the first-order residual

    r_t = a_t x_{t+1} + Σ_d b_td ε_{t+1+d} + c_t ξ_t - x_t, with the sum cut at the window's top. R is the residual
    of the equations unrolled to `order`: the sum telescopes to the anchor's weight, ε and noise.

    x       [W+1, N] float32 or float64: the targets, and on top the anchor, which is final
    eps     [E, N], E >= W, the dtype of x or bfloat16
    a, c    [W] float64; b [W, p] float64: rows of the triangular system
    noise   [W, N] or None (as if zero)
    past_r  R of past rounds, newest first
    order   terms; None: W

    Returns R [W, N]; squares [W] = Σ r_t²; gram [W, Q, Q] and rhs [W, Q], the products ⟨D_i, D_j⟩ and ⟨D_i, R⟩ of each
    row with itself, D_0 = R - past_r[0], D_1 = past_r[0] - past_r[1], …; zero where a row has no such difference. The
    last three are float64; no sum over rows yet.
    Raises ValueError on wrong shapes, dtypes, devices. Source: arXiv 2402.09970, sections 3 and 4.
    """
    _check_window(x, eps)
    window = x.shape[0] - 1
    for name, value, shape in (("a", a, (window,)), ("b", b, (window, None)), ("c", c, (window,))):
        _check_weights(name, value, shape, x)
    if noise is not None:
        check_shape("noise", noise, (window, x.shape[1]))
        check_same("noise", noise, x, "x")
    _check_past("past_r", past_r, x)
    order = window if order is None else order
    check_int("order", order, low=1)
    return op.taa_residual(x, eps, noise, a, b, c, list(past_r), order, backend)


def taa_gamma(squares: torch.Tensor, gram: torch.Tensor, rhs: torch.Tensor, limits: torch.Tensor, lengths: list[int], *,
              ridge: float = 1e-3, relative: bool = True, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """γ_t = (Σ_{s>=t} G_s + λ I)^{-1} Σ_{s>=t} g_s for the rows below the highest unconverged one, 0 for the others.

    squares, limits  [W] float64: a row has converged when squares <= limits
    gram, rhs        [W, Q, Q], [W, Q] float64, from `taa_residual`
    lengths          n_q of each past round: row t uses the rounds with t >= W - n_q
    ridge, relative  λ = ridge times the mean diagonal of the row's sum, or ridge itself

    Returns γ [W, Q] and `highest` int64 [1]: the highest unconverged row, 0 when none is left. Where the system is
    singular, γ = 0.
    """
    check_tensor("rhs", rhs, dim=2)
    window, slots = rhs.shape
    for name, value, shape in (("squares", squares, (window,)), ("gram", gram, (window, slots, slots)),
                               ("rhs", rhs, (window, slots)), ("limits", limits, (window,))):
        _check_weights(name, value, shape, rhs)
    if len(lengths) != slots or any(n < 0 or n > window for n in lengths):
        raise expected("lengths", f"{slots} numbers in [0, {window}]", list(lengths))
    if not ridge >= 0:
        raise expected("ridge", "a number >= 0", ridge)
    return op.taa_gamma(squares, gram, rhs, limits, list(lengths), float(ridge), relative, backend)


def taa_update(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: torch.Tensor, *, past_x: Pasts = (),
               past_r: Pasts = (), enter: tuple | None = None, backend: str = "auto") -> torch.Tensor:
    """x_t + R_t - Σ_q γ_tq (ΔX_tq + ΔR_tq), and below it the rows that enter the window.

    x, residual, eps   as in `taa_residual`; gamma [W, Q] float64
    past_x, past_r     x (without anchor) and R of past rounds, newest first
    enter              (a [g], w [g, E], c [g], noise [g, N] or None): row j of the g entering ones is
                       a_j y_{j+1} + Σ_s w_js ε_s + c_j noise_j, y_{j+1} the row above it; row g-1 lies just below t = 0

    Returns [g + W, N], lowest row first.
    """
    _check_window(x, eps)
    window, size = x.shape[0] - 1, x.shape[1]
    check_shape("residual", residual, (window, size))
    check_same("residual", residual, x, "x")
    _check_past("past_x", past_x, x)
    _check_past("past_r", past_r, x)
    if [len(p) for p in past_x] != [len(p) for p in past_r]:
        raise expected("past_x", f"the rows of past_r ({[len(p) for p in past_r]})", [len(p) for p in past_x])
    _check_weights("gamma", gamma, (window, len(past_r)), x)
    if enter is None:
        none = torch.zeros(0, dtype=torch.float64, device=x.device)
        enter = (none, none.reshape(0, eps.shape[0]), none, None)
    enter_a, enter_w, enter_c, enter_noise = enter
    count = enter_a.shape[0]
    for name, value, shape in (("enter a", enter_a, (count,)), ("enter w", enter_w, (count, eps.shape[0])),
                               ("enter c", enter_c, (count,))):
        _check_weights(name, value, shape, x)
    if enter_noise is not None:
        check_shape("enter noise", enter_noise, (count, size))
        check_same("enter noise", enter_noise, x, "x")
    return op.taa_update(x, residual, list(past_x), list(past_r), gamma, eps, enter_a, enter_w, enter_c, enter_noise,
                         backend)


def _check_window(x, eps) -> None:
    check_tensor("x", x, dim=2, floating=True)
    check_tensor("eps", eps, dim=2, floating=True)
    if x.shape[0] < 2:
        raise expected("x", "at least one target and the anchor", f"{x.shape[0]} rows")
    check_same("eps", eps, x, "x", dtype=False)
    if eps.shape[0] < x.shape[0] - 1 or eps.shape[1] != x.shape[1]:
        raise expected("eps", f"shape [{x.shape[0] - 1} or more, {x.shape[1]}]", list(eps.shape))


def _check_weights(name, value, shape, like) -> None:
    check_tensor(name, value)
    check_shape(name, value, shape)
    check_same(name, value, like, "x", dtype=False)
    if value.dtype != torch.float64:
        raise expected(name, "float64", value.dtype)


def _check_past(name, past, x) -> None:
    rows = x.shape[0] - 1
    for value in past:
        check_tensor(name, value, dim=2)
        check_same(name, value, x, "x")
        if value.shape[1] != x.shape[1] or value.shape[0] > rows:
            raise expected(name, f"shape [{rows} or fewer, {x.shape[1]}], rows never more than in the newer round",
                           list(value.shape))
        rows = value.shape[0]
