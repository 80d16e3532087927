"""How a row that enters the window is guessed from the rows above it."""

from __future__ import annotations

import torch

NAMES = ("velocity", "copy", None)


def entering(name: str | None, system, lowest: int, count: int, eps_rows: int, fresh: int = 0):
    """(a [g], w [g, E], c [g]) of `taa_update` for the states from lowest - count to lowest + fresh - 1.

    lowest    the lowest state of the window so far; ε row j belongs to state lowest + 1 + j
    fresh     rows of the window, from the lowest up, that are taken from the row above them by the sampler's equation
    "copy"      x_i = x_{i+1} (the published way; None is the same)
    "velocity"  x_i from the sampler's own equation, with ε continued below the window along the line through its two
                lowest rows
    """
    rows = count + fresh
    a, c = torch.ones(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    w = torch.zeros(rows, eps_rows, dtype=torch.float64)
    band = system.band
    for row in range(0 if name == "velocity" else count, rows):
        state = lowest - count + row
        a[row], c[row] = system.a[state], system.c[state]
        for d in range(band.shape[1]):
            at = state + d - lowest          # ε row of state + 1 + d
            if at >= eps_rows:
                break
            if at >= 0:
                w[row, at] += band[state, d]
            elif eps_rows == 1:
                w[row, 0] += band[state, d]
            else:
                w[row, 0] += band[state, d] * (1 - at)
                w[row, 1] += band[state, d] * at
    return a, w, c
