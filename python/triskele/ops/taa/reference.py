"""Triangular Anderson acceleration in plain torch, float64: the formulas, and the truth for every kernel.

Row order: row 0 is the lowest target of the window; `x` has one row more, the anchor, on top. A list of past rounds is
newest first, and entry q holds the rows W - n_q … W-1: rows that entered the window later have fewer behind them.
"""

from __future__ import annotations

import torch


def _drive(eps, noise, b, c, window: int):
    """Σ_d b[t, d] eps[t + d] + c[t] noise[t], [W, N]: what row t adds to a[t] x[t+1]."""
    drive = eps.new_zeros(window, eps.shape[1])
    for d in range(b.shape[1]):
        rows = min(window, eps.shape[0] - d)
        if rows > 0:
            drive[:rows] += b[:rows, d, None] * eps[d:d + rows]
    return drive if noise is None else drive + c[:, None] * noise


def _differences(current, past):
    """[W, N] each: current - past_0, past_0 - past_1, …; zero in the rows that have none."""
    out, newer = [], current
    for older in past:
        rows = older.shape[0]
        full = torch.zeros_like(current)
        full[len(full) - rows:] = newer[len(newer) - rows:] - older
        out.append(full)
        newer = older
    return out


def residual(x, eps, noise, a, b, c, past_r, order: int):
    """(R, squares, gram, rhs); see `triskele.ops.taa_residual`."""
    dtype = x.dtype
    x, eps = x.double(), eps.double()
    noise = None if noise is None else noise.double()
    past_r = [r.double() for r in past_r]
    window = a.shape[0]
    first = a[:, None] * x[1:] + _drive(eps, noise, b, c, window) - x[:-1]   # [W, N]
    out = torch.zeros_like(first)
    for t in range(window):
        reach = 1.0                                           # a[t] … a[s-1]
        for s in range(t, min(t + order, window)):
            out[t] += reach * first[s]
            reach = reach * a[s]
    differences = _differences(out, past_r)
    slots = len(differences)
    gram, rhs = x.new_zeros(window, slots, slots), x.new_zeros(window, slots)
    for i, left in enumerate(differences):
        rhs[:, i] = (left * out).sum(1)
        for j, right in enumerate(differences):
            both = min(past_r[i].shape[0], past_r[j].shape[0])
            gram[window - both:, i, j] = (left * right).sum(1)[window - both:]
    return out.to(dtype), (first * first).sum(1), gram, rhs


def gamma(squares, gram, rhs, limits, lengths, ridge: float, relative: bool):
    """(γ [W, Q], highest [1]); see `triskele.ops.taa_gamma`."""
    window, slots = rhs.shape
    unconverged = (squares > limits).nonzero()
    highest = unconverged.max() if unconverged.numel() else torch.zeros((), dtype=torch.int64)
    highest = highest.to(squares.device).reshape(1)
    if slots == 0:
        return torch.zeros_like(rhs), highest
    rows = torch.arange(window, device=rhs.device)
    counts = torch.as_tensor(lengths, device=rhs.device)
    known = rows[:, None] >= window - counts[None, :]                       # [W, Q]
    total = gram.flip(0).cumsum(0).flip(0)                                  # Σ over the rows from t up
    right = rhs.flip(0).cumsum(0).flip(0) * known
    total = total * (known[:, :, None] & known[:, None, :])
    diagonal = total.diagonal(dim1=1, dim2=2)                               # [W, Q]
    mean = diagonal.sum(1) / known.sum(1).clamp(min=1)
    weight = (ridge * mean if relative else torch.full_like(mean, ridge))[:, None]
    usable = known.any(1) & (mean > 0) & (rows < highest)
    fill = torch.where(known & usable[:, None], weight.expand_as(diagonal), torch.ones_like(diagonal))
    total = torch.where(usable[:, None, None], total, torch.zeros_like(total)) + torch.diag_embed(fill)
    solution, info = torch.linalg.solve_ex(total, right[..., None])
    solution = solution[..., 0]
    good = usable & (info == 0) & solution.isfinite().all(1)                # a singular system takes the plain step
    return torch.where(good[:, None] & known, solution, torch.zeros_like(solution)), highest


def update(x, r, past_x, past_r, gamma, eps, enter_a, enter_w, enter_c, enter_noise):
    """[g + W, N]; see `triskele.ops.taa_update`."""
    dtype = x.dtype
    x, r, eps = x.double(), r.double(), eps.double()
    moved = x[:-1] + r
    both = zip(_differences(x[:-1], [p.double() for p in past_x]), _differences(r, [p.double() for p in past_r]))
    for slot, (dx, dr) in enumerate(both):
        moved = moved - gamma[:, slot, None] * (dx + dr)
    rows, below = [], moved[0]
    for row in reversed(range(enter_a.shape[0])):
        below = enter_a[row] * below + enter_w[row] @ eps
        if enter_noise is not None:
            below = below + enter_c[row] * enter_noise[row].double()
        rows.insert(0, below)
    return torch.cat([torch.stack(rows), moved]).to(dtype) if rows else moved.to(dtype)
