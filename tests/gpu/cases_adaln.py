"""Layer norm with modulation, the gated residual, and their backwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from generators import with_outliers
from tolerance import assert_within_budget

from gpu.family import Case, Op

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = [(1, 1, 8), (2, 3, 40), (3, 5, 384), (2, 9, 1153), (1, 6, 1152), (4, 2, 3072)]
EMPTY = [(0, 4, 64), (2, 0, 64)]
LARGE = [(8, 1024, 1152), (2, 512, 1536)]


def _values(shape, dtype, table, rows, affine, seed, outliers=False):
    generator = torch.Generator().manual_seed(seed)
    batch, _, channels = shape
    count = {"a row each": batch, "one row": 1, "indexed": 3}[rows]

    def normal(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(dtype)

    x = 3 * normal(*shape) + 1
    return dict(x=with_outliers(x, 1e3, 0.02) if outliers else x, residual=normal(*shape), grad=normal(*shape),
                scale=normal(count, channels, dtype=table), shift=normal(count, channels, dtype=table),
                gate=normal(count, channels, dtype=table),
                weight=1 + normal(channels, dtype=table) if affine else None,
                bias=normal(channels, dtype=table) if affine else None,
                index=torch.randint(0, 3, (batch,), generator=generator) if rows == "indexed" else None)


def _case(pick, shape, dtype, table=F32, rows="a row each", affine=False, outliers=False):
    def make(seed):
        return pick(_values(shape, dtype, table, rows, affine, seed, outliers))

    traits = [trait for trait, on in (("affine", affine), ("outliers", outliers)) if on]
    name = ", ".join(("x".join(map(str, shape)), str(dtype)[6:], f"rows in {str(table)[6:]}", rows, *traits))
    return Case(name, make, medium=shape in LARGE,
                thorough=dtype is B16 and shape in SMALL[2:4] and rows == "indexed" and not outliers)


def _cases(pick):
    found = [_case(pick, shape, dtype) for shape in (*SMALL, *EMPTY) for dtype in (F32, B16)]
    found += [_case(pick, shape, dtype, table, "indexed", True) for shape in SMALL[1:4] for dtype in (F32, B16, F16)
              for table in (F32, B16)]
    found += [_case(pick, (3, 5, 384), B16, rows="one row", affine=True), _case(pick, (3, 5, 384), F32, outliers=True),
              _case(pick, (3, 5, 384), B16, outliers=True)]
    return (*found, *(_case(pick, shape, B16, B16, "indexed") for shape in LARGE))


def _floor(value, exact):
    return 2 * torch.finfo(value.dtype).eps * max(1.0, float(exact.abs().max())) if exact.numel() else None


def compare_modulate(arguments, got, exact):
    x, scale, shift, index, weight, bias, eps = arguments
    batch = x.shape[0]
    scale, shift = ((t.expand(batch, -1) if index is None else t[index])[:, None].to(x.dtype) for t in (scale, shift))
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    plain = F.layer_norm(x.contiguous(), x.shape[2:], weight, bias, eps) * (1 + scale) + shift
    assert got[0].dtype == x.dtype
    assert_within_budget(got[0], exact[0], plain, floor=_floor(got[0], exact[0]), what="y")


def compare_gate(arguments, got, exact):
    residual, x, gate, index = arguments
    gate = (gate.expand(x.shape[0], -1) if index is None else gate[index])[:, None].to(x.dtype)
    assert got[0].dtype == residual.dtype
    assert_within_budget(got[0], exact[0], residual + gate * x, floor=_floor(got[0], exact[0]), what="y")


def compare_gradients(arguments, got, exact):
    """Sums over tokens are kept in float32: a few roundings of the largest value."""
    for position, (a, e) in enumerate(zip(got, exact)):
        if e.numel():
            floor = 8 * torch.finfo(a.dtype).eps * max(1.0, float(e.abs().max()))
            assert_within_budget(a, e, e.to(a.dtype), floor=floor, what=f"gradient {position}")


OPS = (
    Op("adaln.modulate", "adaln_modulate", _cases(
        lambda v: (v["x"], v["scale"], v["shift"], v["index"], v["weight"], v["bias"], 1e-6)), compare_modulate,
       relaid=(0, 1, 2)),
    Op("adaln.gate", "gate_residual", _cases(lambda v: (v["residual"], v["x"], v["gate"], v["index"])), compare_gate,
       relaid=(0, 1, 2)),
    Op("adaln.modulate_backward", "adaln_modulate_backward", _cases(
        lambda v: (v["grad"], v["x"], v["scale"], v["index"], v["weight"], v["bias"], 1e-6)), compare_gradients),
    Op("adaln.gate_backward", "gate_residual_backward", _cases(
        lambda v: (v["grad"], v["x"], v["gate"], v["index"])), compare_gradients),
)
