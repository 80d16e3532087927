"""Error budgets against a float64 reference. A failure names the worst element."""

from __future__ import annotations

import torch


def worst(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """Largest |actual - expected| and its index. NaN or inf on one side alone counts as infinite."""
    a, e = actual.detach().double(), expected.detach().double()
    error = torch.where((a == e) | (a.isnan() & e.isnan()), torch.zeros_like(a), (a - e).abs())
    error = torch.nan_to_num(error, nan=float("inf"), posinf=float("inf"))
    if error.numel() == 0:
        return 0.0, ()
    flat = int(error.argmax())
    return float(error.flatten()[flat]), tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))


def assert_within_budget(actual, reference64, same_precision, *, floor=None, factor=2.0, what="result"):
    """max |actual - ref64| <= factor * max |same_precision - ref64| + floor.

    same_precision  the reference evaluated in the precision of `actual`; floor: one rounding of the largest value of
                    the result in `actual`'s dtype, unless given.
    """
    assert actual.shape == reference64.shape, f"{what}: shape {tuple(actual.shape)}, want {tuple(reference64.shape)}"
    if floor is None:
        scale = float(reference64.detach().abs().max()) if reference64.numel() else 0.0
        floor = torch.finfo(actual.dtype).eps * max(scale, torch.finfo(actual.dtype).tiny)
    allowed = factor * worst(same_precision, reference64)[0] + floor
    error, at = worst(actual, reference64)
    assert error <= allowed, (
        f"{what}: error {error:.3e} at {at} (got {float(actual[at]):.9g}, want {float(reference64[at]):.9g}); "
        f"allowed {allowed:.3e}")


def relative_norm(actual, expected) -> float:
    """norm(actual - expected) / norm(expected), absolute where `expected` is zero: the measure of the vectors."""
    a, e = actual.detach().double(), expected.detach().double()
    scale = float(e.norm())
    return float((a - e).norm()) / (scale if scale > 0 else 1.0)


def assert_relative(actual, expected, tolerance, what="result"):
    error = relative_norm(actual, expected)
    place, at = worst(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3e} > {tolerance:.1e}; worst {place:.3e} at {at}"
