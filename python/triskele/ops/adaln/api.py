"""norm → modulate and gate → residual, each in one pass over the tokens.

Shapes shared by both. B: samples, L: tokens, C: channels. R: rows of the modulation, one a timestep: `row_index` says
which row each sample takes, so that the pair of guidance, or the prompts of a batch, share one (R < B). Without it R is
B (sample b takes row b) or 1.
"""

from __future__ import annotations

import math

import torch

from triskele.backend import NAMES
from triskele.checks import check_choice, check_same, check_shape, check_tensor, expected
from triskele.ops.adaln import op


def adaln_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, row_index: torch.Tensor | None = None,
                   weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-6,
                   backend: str = "auto") -> torch.Tensor:
    """y_bl = ((x_bl - mean) / sqrt(var + eps) * weight + bias) * (1 + scale_r) + shift_r,  r = row_index[b].

    x             [B, L, C] floating; mean and variance over C, the variance without Bessel's correction
    scale, shift  [R, C] floating, any dtype
    row_index     [B] int64, in [0, R); None: R is B or 1
    weight, bias  [C] floating, the norm's own; None: 1 and 0
    eps           a number >= 0
    backend       "auto", "cuda" and "triton" (x in float32, bfloat16 or float16), "cpu" (x in float32 or bfloat16), all
                  three float32 inside; "reference" (float64, every case)

    Returns [B, L, C] in x's dtype. Differentiable in every floating argument.
    Raises ValueError for shapes, dtypes, devices that do not fit and for indices out of range (those on a GPU are not
    looked at: that would wait for it). Source: DiT, arXiv 2212.09748, section 3.2.
    """
    check_tensor("x", x, dim=3, floating=True)
    if x.shape[2] < 1:
        raise expected("x", "at least one channel", list(x.shape))
    _check_rows("scale", scale, x)
    _check_rows("shift", shift, x)
    check_shape("shift", shift, tuple(scale.shape))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(name, value, floating=True)
            check_shape(name, value, (x.shape[2],))
            check_same(name, value, x, "x", dtype=False)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise expected("eps", "a number >= 0", repr(eps))
    _check_index(row_index, scale.shape[0], "scale", x)
    check_choice("backend", backend, ("auto", *NAMES))
    return op.adaln_modulate(x, scale, shift, row_index, weight, bias, float(eps), backend)


def gate_residual(residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, row_index: torch.Tensor | None = None,
                  backend: str = "auto") -> torch.Tensor:
    """y_bl = residual_bl + gate_r * x_bl,  r = row_index[b].

    residual, x  [B, L, C] floating, of one dtype
    gate         [R, C] floating, any dtype
    row_index    [B] int64, in [0, R); None: R is B or 1
    backend      as in `adaln_modulate`

    Returns [B, L, C] in the dtype of residual. Differentiable in residual, x and gate. Raises ValueError as there.
    """
    check_tensor("residual", residual, dim=3, floating=True)
    check_tensor("x", x, floating=True)
    check_shape("x", x, tuple(residual.shape))
    check_same("x", x, residual, "residual")
    if x.shape[2] < 1:
        raise expected("x", "at least one channel", list(x.shape))
    _check_rows("gate", gate, x)
    _check_index(row_index, gate.shape[0], "gate", x)
    check_choice("backend", backend, ("auto", *NAMES))
    return op.gate_residual(residual, x, gate, row_index, backend)


def _check_rows(name, value, x) -> None:
    check_tensor(name, value, floating=True)
    check_shape(name, value, (None, x.shape[2]))
    check_same(name, value, x, "x", dtype=False)


def _check_index(index, rows: int, of: str, x) -> None:
    if index is None:
        if rows != 1 and rows != x.shape[0]:
            raise expected(of, f"{x.shape[0]} rows, one a sample, or 1 (without row_index)", rows)
        return
    check_tensor("row_index", index)
    check_shape("row_index", index, (x.shape[0],))
    check_same("row_index", index, x, "x", dtype=False)
    if index.dtype != torch.int64:
        raise expected("row_index", "int64", index.dtype)
