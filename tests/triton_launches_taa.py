"""The launches of the fused step's kernels that are held to compile: see triton_offline.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from triton_offline import Case

from triskele.triton_kernels import taa


def _case(state: torch.dtype, eps: torch.dtype, slots: int, order: int, noisy: bool, size: int = 16384) -> Case:
    window, extra, count = 100, 2, 3

    def empty(*shape, dtype=torch.float64):
        return torch.empty(shape, dtype=dtype, device="meta")
    x, r, noise = (empty(rows, size, dtype=state) for rows in (window + 1, window, window))
    past = [empty(window - q, size, dtype=state) for q in range(slots)]
    e, row, b = empty(window + extra, size, dtype=eps), empty(window), empty(window, 3)
    enter = empty(count), empty(count, window + extra), empty(count)

    def call():
        _, squares, gram, rhs = taa.residual(x, e, noise if noisy else None, row, b, row, past, order)
        gamma, _ = taa.gamma(squares, gram, rhs, row, [len(p) for p in past], 1e-3, noisy)
        taa.update(x, r, past, past, gamma, e, *enter, noise[:count] if noisy else None)
    names = [str(dtype).removeprefix("torch.") for dtype in (state, eps)]
    return Case(f"taa {names[0]} eps={names[1]} memory={slots + 1} order={order}{' noisy' * noisy}", call)


def cases(chip: int, full: bool) -> Iterator[Case]:
    if full:
        for (state, eps), slots, order, noisy in product(
                [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64),
                 (torch.float64, torch.bfloat16)], range(5), (100, 8), (False, True)):
            yield _case(state, eps, slots, order, noisy)
        return
    at = (80, 89, 90, 100, 120).index(chip)
    state = torch.float64 if chip == 100 else torch.float32
    size = 777 if at > 2 else 16384
    yield _case(state, state if at % 2 else torch.bfloat16, at, 8 if at % 2 else 100, bool(at % 2), size)


def targets(chip: int) -> Iterator[Case]:
    """SD v1.5, 100 steps, memory 2."""
    yield _case(torch.float32, torch.bfloat16, 1, 100, False)
