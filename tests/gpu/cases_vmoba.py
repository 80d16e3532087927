"""VMoBA: selection, attention over it, and its backward."""

from __future__ import annotations

import torch
from generators import with_outliers
from tolerance import assert_within_budget
from vmoba_cases import MODES, with_gradients

from gpu.family import Case, Op
from triskele.ops import vmoba_partition
from triskele.ops.vmoba import reference

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


def _bounds(length, chunk):
    return (torch.arange(-(-length // chunk) + 1) * chunk).clamp(max=length).to(torch.int32)


LAYOUTS = {  # [B, H, S, D] -> (order, bounds)
    "ragged": ((2, 2, 131, 72), lambda: (None, _bounds(131, 40))),
    "partition": ((1, 3, 420, 64), lambda: _partition((5, 7, 12), (2, 3, 5))),
    "small chunks": ((1, 2, 192, 64), lambda: _partition((4, 6, 8), (1, 2, 2))),
    "long chunks": ((1, 1, 900, 128), lambda: (None, _bounds(900, 300))),
    "one token": ((2, 1, 1, 32), lambda: (None, _bounds(1, 1))),
    "one chunk": ((1, 2, 65, 40), lambda: (None, _bounds(65, 65))),
    "video": ((1, 4, 2520, 128), lambda: _partition((7, 15, 24), (3, 5, 8))),
    "frames": ((1, 2, 4096, 64), lambda: (None, _bounds(4096, 256))),
}
MEDIUM = ("video", "frames")


def _partition(grid, chunk):
    found = vmoba_partition(grid, chunk)
    return found.order, found.bounds


def _inputs(layout, dtype, seed, count, outliers=False):
    shape, make = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for _ in range(count)]
    if outliers:
        tensors[0], tensors[2:] = with_outliers(tensors[0], 10.0, 0.02), [with_outliers(t) for t in tensors[2:]]
    return [t.to(dtype) for t in tensors], *make()


def _mask(q, k, order, bounds):
    return reference.select(q, k, order, bounds, "threshold", "head", 0, 0.4)


def _dense(q, k, v, mask, order, bounds):
    """Attention over an explicit mask in the precision of q; differentiable."""
    where = reference.chunk_of_tokens(order, bounds, q.shape[2])
    seen = mask.permute(0, 2, 3, 1)[..., where] | (where[:, None] == where)
    return ((q @ k.mT) * q.shape[3]**-0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------ attention

def _attention(layout, dtype, outliers=False):
    def make(seed):
        (q, k, v), order, bounds = _inputs(layout, dtype, seed, 3, outliers)
        return q, k, v, order, bounds, _mask(q, k, order, bounds)

    return Case(f"{layout}, {str(dtype)[6:]}{', outliers' if outliers else ''}", make, medium=layout in MEDIUM,
                thorough=dtype is B16 and layout in ("ragged", "partition") and not outliers)


def compare_attention(arguments, got, exact):
    q, k, v, order, bounds, mask = arguments
    assert got[0].dtype == q.dtype and got[0].is_contiguous()
    assert_within_budget(got[0], exact[0], _dense(q, k, v, mask, order, bounds), what="o")
    error = (got[1].double() - exact[1].double()).abs()
    assert not error.numel() or error.max() <= 2e-5 * max(1.0, float(exact[1].abs().max())), f"lse: {error.max():.3e}"


def _backward(layout, dtype, outliers=False):
    def make(seed):
        (q, k, v, grad), order, bounds = _inputs(layout, dtype, seed, 4, outliers)
        mask = _mask(q, k, order, bounds)
        out, lse = reference.attention(q, k, v, order, bounds, mask)
        return grad, q, k, v, out, lse, order, bounds, mask

    return Case(f"{layout}, {str(dtype)[6:]}{', outliers' if outliers else ''}", make, medium=layout in MEDIUM,
                thorough=dtype is B16 and layout in ("ragged", "partition") and not outliers)


def compare_backward(arguments, got, exact):
    grad, q, k, v, _, _, order, bounds, mask = arguments
    with torch.enable_grad():
        rough = with_gradients(lambda *x: _dense(*x, mask, order, bounds), (q, k, v), grad)[1:]
    for name, a, e, r in zip(("dq", "dk", "dv"), got, exact, rough):
        assert a.dtype == q.dtype
        # P = exp(S - lse) is computed anew, from a rounded lse; autograd, which is "rough", kept its P. Where a query
        # sees few keys its terms cancel, and they do so in float32.
        terms = float((grad.float().abs() @ v.float().abs().mT).max() * k.float().abs().max())
        scale = torch.finfo(a.dtype).eps * float(e.abs().max())
        assert_within_budget(a, e, r, factor=4.0, floor=max(scale, torch.finfo(F32).eps * terms), what=name)


SMALL = [layout for layout in LAYOUTS if layout not in MEDIUM]
GRID = [*((layout, dtype) for layout in SMALL for dtype in (F32, B16, F16)),
        *((layout, dtype) for layout in MEDIUM for dtype in (B16, F16)), ("ragged", F32, True), ("ragged", B16, True)]
ATTENTION = Op("vmoba.attention", "vmoba_attention", tuple(_attention(*at) for at in GRID), compare_attention,
               relaid=(0, 1, 2, 5))
BACKWARD = Op("vmoba.attention_backward", "vmoba_attention_backward", tuple(_backward(*at) for at in GRID),
              compare_backward, relaid=(0, 1, 2, 3, 4, 8))


# ------------------------------------------------------------------------------------------------ selection

def _select(layout, dtype, mode, pool, exact=False):
    def make(seed):
        (q, k), order, bounds = _inputs(layout, dtype, seed, 2)
        if exact:  # no rounding: ties are ties
            q, k = q.sign(), k.sign()
        return q, k, order, bounds, mode, pool, min(2, len(bounds) - 1), 0.4

    return Case(f"{layout}, {str(dtype)[6:]}, {mode} by {pool}{', ties' if exact else ''}", make,
                medium=layout in MEDIUM, thorough=layout == "partition" and dtype is B16 and pool == "query")


def compare_select(arguments, got, exact):
    """The very mask; among gates that float32 does not tell apart any may be chosen."""
    got, exact = got[0], exact[0]
    assert got.dtype == torch.bool and got.shape == exact.shape
    share = float((got != exact).double().mean()) if got.numel() else 0.0
    assert share <= 2e-4, f"{share:.2%} of the entries differ"
    own = reference.self_mask(arguments[2], arguments[3], arguments[0].shape[2])[None, :, None, :]
    assert (got | ~own).all(), "a query does not attend to its own chunk"


SELECT = Op("vmoba.select", "vmoba_select", (
    *(_select("partition", dtype, mode, pool) for mode, pool in MODES for dtype in (F32, B16)),
    *(_select(layout, B16, "topk", "query") for layout in LAYOUTS if layout != "partition"),
    _select("ragged", F16, "topk", "query"), _select("video", B16, "threshold", "head"),
    _select("small chunks", F32, "topk", "query", exact=True),
), compare_select, relaid=(0, 1))

OPS = (SELECT, ATTENTION, BACKWARD)
