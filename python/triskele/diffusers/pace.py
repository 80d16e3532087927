"""How fast rows are on this device, and what window follows: sampling must not get slower in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

WINDOWS = (4, 8, 16, 32)
"""What window="auto" tries, as far as it pays and fits the memory."""


@dataclass
class Pace:
    """What is known of one shape of call.

    window       rows a round; None: sequential
    row_seconds  of a denoiser call as the pipeline makes it, without a window; None: not measured yet
    settled      the choice has been held against a whole run
    """

    window: int | None
    row_seconds: float | None = None
    settled: bool = False


def expected_rounds(steps: int, window: int) -> float:
    """Rounds of a guided sampling of `steps` steps: what windows of 4 and 8 took on a model problem (17 and 11 for 50
    steps), and no fewer than the nine or so that a window of all steps took."""
    return max(steps / window**0.72, min(steps, 9.0))


def choose(seconds: Callable[[int], float], steps: int) -> tuple[Pace, str]:
    """The window of the shortest expected sampling, and the line that says why.

    seconds  window -> seconds of one denoiser call of so many rows a sample; raises torch.OutOfMemoryError where they
             do not fit. Called for window 1 and for ever larger ones, until the next cannot pay.
    """
    row = min(seconds(1), seconds(1))
    best, best_time, tried = None, steps * row, []
    for window in [w for w in WINDOWS if w < steps] or [steps]:
        try:
            wide = seconds(window)
        except torch.OutOfMemoryError:
            tried.append(f"{window} rows do not fit the memory")
            break
        total = expected_rounds(steps, window) * wide
        tried.append(f"{window} rows {wide * 1e3:.3g} ms")
        if total < best_time:
            best, best_time = window, total
        elif best is not None or total > 1.5 * best_time:
            break
    told = f"a denoiser call takes {row * 1e3:.3g} ms, " + ", ".join(tried)
    if best is None:
        return Pace(None, row), (f"ParaTAA: sequential sampling is faster here and is used ({told}); "
                                 "window=8, say, runs in parallel all the same")
    return Pace(best, row), f"ParaTAA: window {best}, expected {steps * row / best_time:.2g}x faster ({told})"


def too_slow(pace: Pace, steps: int, calls: int, rounds: int, seconds: float) -> str | None:
    """One line when a finished sampling took longer than the sequential one would have, else None.

    calls    denoiser calls of a round (2 where guidance makes its own); seconds: of the whole loop
    """
    sequential = steps * calls * pace.row_seconds
    if seconds <= sequential:
        return None
    return (f"ParaTAA: {rounds} rounds of window {pace.window} took {seconds:.3g} s; {steps} sequential steps would "
            f"take about {sequential:.3g} s on this device")
