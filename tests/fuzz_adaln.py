"""Fuzz cases of the modulated layer norm and the gated residual."""

from __future__ import annotations

import torch
from fuzz_draw import Draw
from tolerance import assert_within_budget

from triskele.ops import adaln_modulate, gate_residual


def _shapes(draw: Draw):
    """[B, L, C], the rows of the modulation, and the row that each sample takes."""
    batch, tokens = draw.random.choice((0, 1, 2, 3, 5)), draw.size("L", draw.random.choice((12, 80)), low=0)
    channels = draw.size("C", draw.random.choice((40, 300, 1300)))
    if draw.flag("indexed"):
        rows = draw.size("R", 4)
        return batch, tokens, channels, rows, draw.integers("row_index", 0, rows - 1, batch, dtype=torch.int64)
    return batch, tokens, channels, draw.choice("R", (1, batch)), None


def _modulated(compute, x, scale, shift, index, weight, bias, eps):
    """The formula in `compute`."""
    x, scale, shift = x.to(compute), scale.to(compute), shift.to(compute)
    z = torch.nn.functional.layer_norm(x, x.shape[2:], None, None, eps)
    z = z if weight is None else z * weight.to(compute)
    z = z if bias is None else z + bias.to(compute)
    scale, shift = ((row.expand(len(x), -1) if index is None else row[index])[:, None] for row in (scale, shift))
    return z * (1 + scale) + shift


def modulate(draw: Draw) -> None:
    dtype = draw.choice("dtype", (torch.float32, torch.bfloat16))
    table = draw.choice("table", (torch.float32, torch.bfloat16))
    batch, tokens, channels, rows, index = _shapes(draw)
    x = draw.tensor("x", batch, tokens, channels, dtype=dtype, scale=draw.random.choice((1.0, 10.0)))
    scale, shift = (draw.tensor(name, rows, channels, dtype=table) for name in ("scale", "shift"))
    weight, bias = (draw.tensor(name, channels, dtype=table) if draw.flag(f"has {name}") else None
                    for name in ("weight", "bias"))
    eps = draw.choice("eps", (1e-6, 1e-3))
    call = x, scale, shift, index, weight, bias, eps
    got = adaln_modulate(*call, backend="cpu")
    assert got.dtype == dtype
    assert got.shape == x.shape
    if not x.numel():
        return
    truth, rough = _modulated(torch.float64, *call), _modulated(dtype, *call)
    # of a token whose values are nearly equal, what is left of them is noise: as many roundings as the mean is larger
    size = x.double().abs().amax(2) / (x.double().var(2, correction=0) + eps).sqrt()
    noise = torch.finfo(torch.float32).eps * float(size.max())
    gain = float((1 + scale.double()).abs().max()) * (1.0 if weight is None else float(weight.double().abs().max()))
    largest = max(1.0, float(truth.abs().max()))
    assert_within_budget(got, truth, rough, what="y", factor=3,
                         floor=4 * torch.finfo(dtype).eps * largest + 16 * noise * gain)


def gate(draw: Draw) -> None:
    dtype = draw.choice("dtype", (torch.float32, torch.bfloat16))
    batch, tokens, channels, rows, index = _shapes(draw)
    residual, x = (draw.tensor(name, batch, tokens, channels, dtype=dtype) for name in ("residual", "x"))
    table = draw.tensor("gate", rows, channels, dtype=draw.choice("table", (torch.float32, torch.bfloat16)))
    got = gate_residual(residual, x, table, index, backend="cpu")
    row = (table.double().expand(batch, -1) if index is None else table.double()[index])[:, None]
    truth = residual.double() + row * x.double()
    assert got.dtype == dtype
    terms = float((residual.double().abs() + (row * x.double()).abs()).max()) if truth.numel() else 0.0
    assert_within_budget(got, truth, truth, what="y", floor=torch.finfo(dtype).eps * terms)


CASES = {"adaln.modulate": modulate, "adaln.gate": gate}
