"""Argument checks shared by the public functions. Each prints what was expected and what came."""

from __future__ import annotations

import torch


def expected(name: str, want, got) -> ValueError:
    """The error that every check raises: `name: expected want, got got`."""
    return ValueError(f"{name}: expected {want}, got {got}")


def check_tensor(name: str, value, *, dim: int | None = None, floating: bool = False) -> None:
    if not isinstance(value, torch.Tensor):
        raise expected(name, "a tensor", type(value).__name__)
    if dim is not None and value.dim() != dim:
        raise expected(name, f"{dim} dimensions", f"{value.dim()} (shape {tuple(value.shape)})")
    if floating and not value.is_floating_point():
        raise expected(name, "a floating-point dtype", value.dtype)


def check_shape(name: str, value: torch.Tensor, shape: tuple) -> None:
    """`shape` holds ints, or None where any size will do."""
    if value.dim() != len(shape) or any(w is not None and w != g for w, g in zip(shape, value.shape)):
        want = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        raise expected(name, f"shape {want}", list(value.shape))


def check_same(name: str, value: torch.Tensor, like: torch.Tensor, like_name: str, *, dtype: bool = True) -> None:
    if value.device != like.device:
        raise expected(name, f"the device of {like_name} ({like.device})", value.device)
    if dtype and value.dtype != like.dtype:
        raise expected(name, f"the dtype of {like_name} ({like.dtype})", value.dtype)


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise expected(name, f"one of {tuple(choices)}", repr(value))


def check_int(name: str, value, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        want = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        raise expected(name, want, repr(value))
