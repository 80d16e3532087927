"""Fuzz cases of VMoBA: selection, attention and its gradients."""

from __future__ import annotations

import math

import torch
from fuzz_draw import Draw
from large_scores import assert_one_key_each
from tolerance import assert_within_budget

from triskele.ops import vmoba_attention, vmoba_partition, vmoba_select
from triskele.ops.vmoba import reference
from triskele.ops.vmoba.api import POOLS, _layout


def _problem(draw: Draw, names, dtype, length: int):
    """The tensors, and the chunk: a length, or a partition of a grid."""
    batch, heads = draw.random.choice((1, 1, 2, 3)), draw.random.choice((1, 2, 3))
    if draw.flag("partition"):
        grid = draw.choice("grid", [(3, 5, 7), (1, 9, 8), (4, 6, 8), (5, 1, 3), (2, 7, 11), (1, 1, 1), (6, 5, 5)])
        axes = [draw.random.randint(1, n + 1) for n in grid]
        half = axes[0] / 2 if grid[1] * grid[2] > 1 else 1
        sizes = draw.choice("sizes", [axes[0], half, tuple(axes[1:]), tuple(axes)])
        chunk, tokens = vmoba_partition(grid, sizes), math.prod(grid)
    else:
        tokens = draw.size("S", length)
        chunk = draw.size("chunk", 130)
    if draw.random.random() < 0.03:
        batch = 0
        if isinstance(chunk, int):
            batch, tokens = draw.choice("empty", [(0, tokens), (1, 0)])
    dim = draw.size("D", draw.random.choice((48, 80, 128, 256)))
    return [draw.tensor(n, batch, heads, tokens, dim, dtype=dtype) for n in names], chunk


def _selection(draw: Draw) -> dict:
    select = draw.choice("select", tuple(POOLS))
    setting = {"select": select, "pool": draw.choice("pool", POOLS[select])}
    if select == "topk":
        return {**setting, "top_k": draw.size("top_k", 40)}
    return {**setting, "threshold": draw.share("threshold", 0.01, 1.0)}


def select(draw: Draw) -> None:
    """The reference's mask: gates are summed in float64 and rounded once on both sides."""
    dtype = draw.choice("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    (q, k), chunk = _problem(draw, "qk", dtype, 300)
    setting = _selection(draw)
    got = vmoba_select(q, k, chunk=chunk, **setting, backend="cpu")
    want = vmoba_select(q, k, chunk=chunk, **setting, backend="reference")
    assert got.shape == want.shape
    wrong = (got != want).nonzero()
    assert not len(wrong), f"the mask differs at {len(wrong)} places, the first {wrong[0].tolist()}"


def _attention(q, k, v, chunk, mask, compute):
    """Over an explicit mask, in `compute`; differentiable."""
    order, bounds = _layout(chunk, q)
    where = reference.chunk_of_tokens(order, bounds, q.shape[2])
    seen = mask.permute(0, 2, 3, 1)[..., where] | (where[:, None] == where)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~seen, -math.inf).softmax(-1) @ v


def attention(draw: Draw) -> None:
    """Forward and gradients over a drawn mask, or over the selection's."""
    dtype = draw.choice("dtype", (torch.float32, torch.bfloat16))
    (q, k, v), chunk = _problem(draw, "qkv", dtype, 220)
    if draw.flag("drawn mask"):
        chunks = _layout(chunk, q)[1].shape[0] - 1
        mask = draw.bools("mask", q.shape[0], chunks, q.shape[1], q.shape[2], share=draw.share("density"))
        setting = {"mask": mask}
    else:
        setting = _selection(draw)
        mask = vmoba_select(q, k, chunk=chunk, **setting, backend="reference")
    upstream = draw.tensor("d", *q.shape, dtype=dtype)

    def results(run, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    got = results(lambda *x: vmoba_attention(*x, chunk=chunk, **setting, backend="cpu"), q, k, v)
    truth = results(lambda *x: _attention(*x, chunk, mask, torch.float64), q.double(), k.double(), v.double())
    rough = results(lambda *x: _attention(*x, chunk, mask, dtype), q, k, v)
    eps = torch.finfo(dtype).eps
    pieces = float((upstream.double() * truth[0]).norm(dim=-1).max()) if q.numel() else 0.0
    widest = max((float(x.double().abs().max()) for x in (q, k) if x.numel()), default=0.0)
    # The saved output is rounded: each row's sum of dO O carries that, times the scale and a key.
    slack = 4 * eps * q.shape[3] ** -0.5 * pieces * widest * math.sqrt(max(1, q.shape[2]))
    for name, a, t, r in zip(("o", "dq", "dk", "dv"), got, truth, rough):
        largest = float(t.abs().max()) if t.numel() else 0.0
        floor = 4 * eps * largest if name == "o" else slack + 8 * eps * largest
        assert_within_budget(a, t, r, what=name, factor=4, floor=floor)


def large(draw: Draw) -> None:
    """Scores of any size: everything stays finite, and a row that clearly sees one key is its value."""
    dtype = draw.choice("dtype", (torch.float32, torch.bfloat16))
    (q, k, v), chunk = _problem(draw, "qkv", dtype, 160)
    sizes = [10.0 ** draw.share(f"magnitude of {name}", 0, 8) for name in "qk"]
    leaves = [(x * size).detach().requires_grad_() for x, size in zip((q, k, v), (*sizes, 1.0))]
    order, bounds = _layout(chunk, q)
    where = reference.chunk_of_tokens(order, bounds, q.shape[2])
    mask = draw.bools("mask", q.shape[0], bounds.shape[0] - 1, q.shape[1], q.shape[2], share=draw.share("density"))
    o = vmoba_attention(*leaves, chunk=chunk, mask=mask, backend="cpu")
    if not o.numel():
        return
    seen = mask.permute(0, 2, 3, 1)[..., where] | (where[:, None] == where)
    assert_one_key_each(o.detach(), *(x.detach() for x in leaves), seen, q.shape[3] ** -0.5)
    for name, grad in zip(("dq", "dk", "dv"), torch.autograd.grad(o.float().sum(), leaves)):
        assert grad.isfinite().all(), f"{name} is not finite"


CASES = {"vmoba.select": select, "vmoba.attention": attention, "vmoba.large": large}
