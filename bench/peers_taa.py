"""The step of parallel sampling as published, in plain float64 torch: the peer of the fused step.

    step = published_step(a, b, c)
    moved, highest = step(x, eps, past_x, past_r)

takes one whole window through one round: residual, sums, per-row solve, update. Written from the description of the
published iteration (arXiv 2402.09970, and what tests/vectors/sampling says of its code), array by array: every line is
one or more passes over [window, N] in float64, as there.
"""

from __future__ import annotations

import torch


def published_step(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, noise: torch.Tensor | None = None, *,
                   tolerance: float = 1e-3, ridge: float = 1e-3):
    """The round of a first-order system with weights a, b, c [W] float64, order = window, as a call.

    step(x [W+1, N], eps [W, N], past_x, past_r) -> (the window after the round [W, N], highest unconverged row [1]).
    Row 0 is the lowest; past_x, past_r: [W, N] of the round before, or a list of such, newest first.
    """

    def step(x, eps, past_x=(), past_r=()):
        dtype, x, eps = x.dtype, x.double(), eps.double()
        past_x, past_r = _doubled(past_x), _doubled(past_r)
        targets, window = x[:-1], len(a)
        xi = torch.zeros_like(eps) if noise is None else noise.double()
        drive = b[:, None] * eps + c[:, None] * xi
        first = a[:, None] * x[1:] + drive - targets
        unconverged = (first**2).mean(1).sqrt() > tolerance
        highest = int(unconverged.nonzero().max()) if unconverged.any() else 0

        reach = _reaches(a)                                                # [W, W + 1]: a_t … a_{s-1}, s >= t
        r = reach[:, window:] * x[window:] + reach[:, :window] @ drive - targets
        moved = targets + r
        if past_r:
            d_x = torch.stack([new - old for new, old in zip([targets, *past_x], past_x)])    # [Q, W, N]
            d_r = torch.stack([new - old for new, old in zip([r, *past_r], past_r)])
            slots = len(d_r)
            gram, rhs = x.new_empty(window, slots, slots), x.new_empty(window, slots)
            for i in range(slots):
                for j in range(slots):
                    gram[:, i, j] = _from_here_up((d_r[i] * d_r[j]).sum(1))
                rhs[:, i] = _from_here_up((d_r[i] * r).sum(1))
            gram += ridge * torch.eye(slots, dtype=x.dtype, device=x.device)
            gamma = torch.linalg.solve(gram, rhs[..., None])[..., 0]       # [W, Q]
            correction = (gamma.T[..., None] * (d_x + d_r)).sum(0)
            moved[:highest] -= correction[:highest]                        # the safeguard: plain step from there up
        return moved.to(dtype), torch.tensor([highest], device=x.device)

    return step


def _doubled(past) -> list[torch.Tensor]:
    return [past.double()] if isinstance(past, torch.Tensor) else [p.double() for p in past]


def _from_here_up(rows: torch.Tensor) -> torch.Tensor:
    return rows.flip(0).cumsum(0).flip(0)


def _reaches(a: torch.Tensor) -> torch.Tensor:
    """[W, W + 1]: at (t, s) the product a_t … a_{s-1}, one at s = t, zero below."""
    window = len(a)
    factors = torch.ones(window, window + 1, dtype=a.dtype, device=a.device)
    above = torch.ones(window, window, dtype=torch.bool, device=a.device).triu()
    factors[:, 1:] = torch.where(above, a.expand(window, window), factors[:, 1:])
    return factors.cumprod(1).triu()


def floor_bytes(window: int, size: int, memory: int) -> int:
    """Every array once a pass, float32 states and bfloat16 ε. Pass one: x, ε, past R, R. Pass two: x, R, past x and R,
    the new x, and the model's next input in bfloat16. 36 bytes an element at memory 2."""
    past = memory - 1
    return window * size * ((4 + 2 + 4 * past + 4) + (4 + 4 + 8 * past + 4 + 2))
