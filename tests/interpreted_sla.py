"""The SLA kernels in Triton's interpreter, on CPU tensors: published vectors, error budgets, hostile inputs. Run by
test_triton_sla.py, which takes a part of the vectors; see interpreted.py."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Vectors, vector_files
from generators import heads_last, strided
from sla_cases import Published, at_precision, problem
from tolerance import assert_relative, assert_within_budget

from triskele.ops.sla import reference
from triskele.ops.sla.reference import Settings
from triskele.triton_kernels import sla_backward, sla_forward, sla_route

CASES = [p for p in vector_files("attention", "sla_*") if "inputs" not in p.stem]
SHAPES = [  # shape, Lk, block_q, block_k, mask
    ((1, 2, 130, 64), None, 128, 64, False),
    ((2, 1, 63, 24), 130, 16, 24, True),
    ((1, 1, 65, 72), 33, 48, 64, True),
]
BRANCHES = [("all", "softmax", "proj"), ("complement", "elu", "alpha"), ("marginal", "relu", "proj")]


# ------------------------------------------------------------------------------------------------ routing

@pytest.mark.parametrize("path", CASES[::5], ids=lambda p: p.stem)
def test_route_vectors(path):
    case = Published(Vectors(path), torch.float32)
    blocks = case.map.shape[3]
    keep = min(blocks, max(1, math.floor(case.keep * blocks)))
    for dtype in (torch.float32, torch.float16):
        got = sla_route.route(case.q.to(dtype), case.k.to(dtype), keep, 0, *case.blocks.values())
        assert torch.equal(got, case.map), dtype


@pytest.mark.parametrize("batch, lq, lk, block_q, block_k, keep, drop", [
    (2, 37, 50, 16, 8, 2, 3), (1, 5, 76, 5, 2, 9, 10), (1, 20, 30, 20, 7, 5, 0)])
def test_route_and_lists(monkeypatch, batch, lq, lk, block_q, block_k, keep, drop):
    monkeypatch.setattr(sla_route, "TILE", 16)  # so that a row of the map is more than one
    q, k = torch.randn(batch, batch, lq, 40), torch.randn(batch, batch, lk, 40)
    mask = torch.rand(batch, lk) > 0.3
    mask[0, :block_k] = False
    kept = torch.rand(1, lk) > 0.97
    k = k.masked_fill(~mask[:, None, :, None], math.nan)
    for layout in (strided, heads_last):
        got = sla_route.route(layout(q), layout(k), keep, drop, block_q, block_k, strided(kept), strided(mask))
        assert torch.equal(got, reference.route(q, k, keep, drop, block_q, block_k, kept, mask))
    for lists, critical in ((sla_route.row_lists(got), got == 1), (sla_route.column_lists(got), (got == 1).mT)):
        places, counts = lists
        assert torch.equal(counts, critical.sum(-1))
        for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            at = tuple(at)
            assert torch.equal(places[at][:counts[at]], critical[at].nonzero()[:, 0])


def test_ties_rank_by_index():
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 4, 8).repeat(1, 1, 10, 1)
    got = sla_route.route(q, k, 3, 4, 8, 4)
    assert (got == torch.tensor([1] * 3 + [0] * 3 + [-1] * 4, dtype=torch.int8)).all()
    zero = sla_route.route(q, torch.tensor([-0.0, 0.0, -0.0])[:, None].expand(1, 2, 3, 8).contiguous(), 1, 1, 8, 1)
    assert (zero == torch.tensor([1, 0, -1], dtype=torch.int8)).all()


# ------------------------------------------------------------------------------------------------ forward

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_vectors(path, dtype):
    case = Published(Vectors(path), dtype)
    settings = Settings(*case.blocks.values(), case.feature, case.scope, case.q.shape[3] ** -0.5)
    args = case.q, case.k, case.v, case.map, case.weight, case.bias, None, None, settings
    parts = sla_forward.forward(*args, True)
    exact = dtype == torch.float32 and not case.half
    tolerance = 1e-5 if exact else 2e-2
    for name, actual in zip(("o", "o_s", "o_l"), parts):
        assert_relative(actual[:, :, case.rows], case.vectors[name], tolerance, name)
        assert_relative(actual.double().mean(-1), case.vectors[f"rowmean_{name}"], tolerance, f"rowmean_{name}")
    assert_relative(parts[3] / math.log(2), case.vectors["lse2"], 1e-6 if exact else 1e-3, "lse2")
    do = case.do.float()  # o = o_sparse + o_linear W^T + b
    grads = sla_backward.backward(*args[:4], *parts[1:], do, do @ case.weight.float(), None, None, settings)
    for name, grad in zip(("dq", "dk", "dv"), grads):
        tolerance = 1e-5 if exact else 3e-2
        assert_relative(grad[:, :, case.rows], case.vectors[name], tolerance, name)
        assert_relative(grad.double().mean(-1), case.vectors[f"rowmean_{name}"], tolerance, f"rowmean_{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape, lk, block_q, block_k, mask", SHAPES)
def test_error_budget(shape, lk, block_q, block_k, mask, dtype):
    q, k, v, block_map, key_mask = problem(shape, lk, dtype, block_q, block_k, mask=mask)
    dim = shape[3]
    weight, bias, alpha = torch.randn(dim, dim) * dim ** -0.5, torch.randn(dim), torch.rand(shape[:3])
    for scope, feature, branch in BRANCHES:
        settings = Settings(block_q, block_k, feature, scope, -dim ** -0.5 if scope == "all" else dim ** -0.5)
        joined = (weight, bias, None) if branch == "proj" else (None, None, alpha)
        truth = at_precision(torch.float64, q, k, v, block_map, settings, *joined, key_mask)
        same = at_precision(dtype, q, k, v, block_map, settings, *joined, key_mask)
        got = sla_forward.forward(q, k, v, block_map, *joined, key_mask, settings, True)
        for name, a, t, r in zip(("o", "o_sparse", "o_linear"), got, truth, same):
            assert_within_budget(a, t, r, what=f"{name} {feature} {scope} {branch}")
        finite = ~truth[3].isinf()
        assert torch.equal(got[3].isinf(), ~finite)
        assert_within_budget(got[3][finite], truth[3][finite], truth[3][finite].float(), floor=3e-6)
        alone = sla_forward.forward(q, k, v, block_map, *joined, key_mask, settings, False)
        assert torch.equal(alone[0], got[0]) and torch.equal(alone[3], got[3])  # the parts change nothing


def test_float16_range():
    """elu features of long sums: H alone would be beyond 65504."""
    q, k, v, block_map, _ = problem((1, 1, 128, 32), 512, torch.float16, 64, 64)
    q, k, v = q + 30, k + 60, v * 8 + 20
    for scope in ("all", "complement"):
        settings = Settings(64, 64, "elu", scope, 0.01)
        got = sla_forward.forward(q, k, v, block_map, None, None, None, None, settings, True)
        want = at_precision(torch.float64, q, k, v, block_map, settings)
        assert want[2].abs().max() > 10
        assert_relative(got[2], want[2], 2e-3, scope)


def test_hidden_keys_and_layouts():
    q, k, v, block_map, key_mask = problem((2, 1, 40, 16), 70, block_q=16, block_k=32, mask=True)
    settings = Settings(16, 32, "elu", "complement", 0.2)
    hidden = ~key_mask[:, None, :, None]
    want = sla_forward.forward(q, k, v, block_map, None, None, None, key_mask, settings, True)
    upstream = [torch.randn_like(x) for x in want[:2]]
    grads = sla_backward.backward(q, k, v, block_map, *want[1:], *upstream, None, key_mask, settings)
    k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf)
    for layout in (strided, heads_last):
        args = layout(q), layout(k), layout(v), strided(block_map)
        got = sla_forward.forward(*args, None, None, None, strided(key_mask), settings, True)
        again = sla_backward.backward(*args, *want[1:], *map(layout, upstream), None, strided(key_mask), settings)
        for a, b in zip((*got, *again), (*want, *grads)):
            assert torch.equal(a, b)
    assert not grads[1].masked_select(hidden).any() and not grads[2].masked_select(hidden).any()


@pytest.mark.parametrize("batch, lq, lk", [(0, 8, 8), (1, 0, 8), (1, 8, 0)])
def test_empty(batch, lq, lk):
    q, k = torch.randn(batch, 2, lq, 16), torch.randn(batch, 2, lk, 16)
    block_map = sla_route.route(q, k, 1, 0, 4, 4)
    assert block_map.shape == (batch, 2, -(-lq // 4), -(-lk // 4))
    settings = Settings(4, 4, "softmax", "complement", 1.0)
    o, o_sparse, o_linear, lse = sla_forward.forward(q, k, k, block_map, None, None, None, None, settings, True)
    assert o.shape == q.shape and not o.any() and not o_linear.any() and (lse == -math.inf).all()
    for grad in sla_backward.backward(q, k, k, block_map, o_sparse, o_linear, lse, o, o, None, None, settings):
        assert not grad.any()


# ------------------------------------------------------------------------------------------------ backward

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("shape, lk, block_q, block_k, mask", SHAPES)
def test_backward(shape, lk, block_q, block_k, mask, dtype, tolerance):
    q, k, v, block_map, key_mask = problem(shape, lk, dtype, block_q, block_k, mask=mask)
    for scope, feature, _ in [*BRANCHES, (None, "softmax", "none")]:
        settings = Settings(block_q, block_k, feature, scope or "all", 0.15)
        _, o_sparse, o_linear, lse = reference.forward(q, k, v, block_map, None, None, None, key_mask, settings, True)
        d_sparse, d_linear, d_lse = torch.randn(shape), torch.randn(shape), torch.randn(shape[:3])
        if scope is None:
            d_linear = d_lse = None
        wide = [x.double() for x in (q, k, v)]
        tail = d_sparse, d_linear, d_lse, key_mask, settings
        want = reference.backward(*wide, block_map, None, None, None, *tail)
        got = sla_backward.backward(q, k, v, block_map, o_sparse, o_linear, lse, *tail)
        for name, a, b in zip(("dq", "dk", "dv"), got, want):
            assert a.dtype == dtype
            assert_relative(a, b, tolerance, f"{name} {scope} {feature}")
