"""Sparse-linear attention, backward: published gradients, autograd on the reference, budgets, masks, determinism."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Vectors, vector_files
from generators import heads_last, strided
from sla_cases import FEATURES, SCOPES, SHAPES, Published, at_precision, problem
from tolerance import assert_relative, assert_within_budget

import triskele
from triskele.ops import sparse_linear_attention
from triskele.ops.sla import reference
from triskele.ops.sla.op import sla_attention, sla_backward
from triskele.ops.sla.reference import Settings

CASES = vector_files("attention", "sla_main_*") + vector_files("attention", "sla_sla1_*")


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float32), ("reference", torch.float16),
                                            ("cpu", torch.float32), ("cpu", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_vectors(path, backend, dtype):
    case = Published(Vectors(path), dtype)
    leaves = [case.q, case.k, case.v, case.weight, case.bias]
    for x in leaves:
        x.requires_grad_()
    grads = torch.autograd.grad(case.attend(backend), leaves, case.do)
    tolerance = 1e-5 if dtype == torch.float32 and not case.half else 3e-2
    for name, grad in zip(("dq", "dk", "dv"), grads):
        assert_relative(grad[:, :, case.rows], case.vectors[name], tolerance, name)
        assert_relative(grad.double().mean(-1), case.vectors[f"rowmean_{name}"], tolerance, f"rowmean_{name}")
    assert_relative(grads[3], case.vectors["dproj_weight"], tolerance, "dproj_weight")
    assert_relative(grads[4], case.vectors["dproj_bias"], tolerance, "dproj_bias")


# ------------------------------------------------------------------------------------------------ the reference itself

@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("scope", SCOPES)
def test_reference_backward_is_autograds(scope, feature):
    """The written-out backward against autograd through the reference's forward; all parts, lse too."""
    q, k, v, block_map, key_mask = problem((2, 2, 50, 8), 41, block_q=16, block_k=8, mask=True)
    block_map[:, :, 0, :] = 1  # every row but those of the last block sees something
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    config = Settings(16, 8, feature, scope, 0.4)
    seen = slice(0, 48)
    parts = [x[:, :, seen] for x in reference.branches(q, k, v, block_map, key_mask, config)]
    finite = ~parts[2].isinf()
    upstream = [torch.randn_like(x) for x in parts]
    upstream[2] = upstream[2] * finite
    want = torch.autograd.grad([parts[0], parts[1], parts[2].masked_fill(~finite, 0)], (q, k, v), upstream)
    full = [torch.nn.functional.pad(g, (0, 0) * (g.dim() - 3) + (0, 2)) for g in upstream]
    got = reference.backward(q.detach(), k.detach(), v.detach(), block_map, None, None, None, *full, key_mask, config)
    for name, a, b in zip(("dq", "dk", "dv"), got, want):
        assert_relative(a, b, 1e-12, name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-7), (torch.bfloat16, 4e-3)],
                         ids=str)
def test_reference_gradients_are_rounded_once(dtype, tolerance):
    """Large scores, where a float32 lse alone would cost far more than the tolerance of float32."""
    q, k, v, block_map, _ = problem((1, 2, 96, 64), None, dtype, block_q=32, block_k=16)
    q, config = q * 16, Settings(32, 16, "elu", "all", 1.0)
    weight, bias, upstream = torch.randn(64, 64, dtype=dtype), torch.randn(64, dtype=dtype), torch.randn_like(q)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = sparse_linear_attention(q, k, v, block_map, 32, 16, "elu", "all", weight, bias, scale=1.0, backend="reference")
    got = torch.autograd.grad(o, leaves, upstream)
    exact = at_precision(torch.float64, q, k, v, block_map, config, weight, bias)[0]
    for name, a, b in zip(("dq", "dk", "dv"), got, torch.autograd.grad(exact, leaves, upstream.double())):
        assert_relative(a, b, tolerance, name)


@pytest.mark.parametrize("scope", SCOPES)
def test_gradcheck(scope):
    q, k, v, block_map, key_mask = problem((1, 2, 20, 4), 17, block_q=8, block_k=4, mask=True)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    weight, bias = torch.randn(4, 4).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    alpha = torch.rand(2, 1).double().requires_grad_()

    def attend(q, k, v, **branch):
        parts = sparse_linear_attention(q, k, v, block_map, 8, 4, "elu", scope, key_mask=key_mask, return_parts=True,
                                        backend="reference", **branch)
        return parts[:3]  # lse is float32: too coarse for finite differences

    assert torch.autograd.gradcheck(lambda q, k, v, w, b: attend(q, k, v, proj_weight=w, proj_bias=b),
                                    (q, k, v, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(lambda q, k, v, a: attend(q, k, v, alpha=a), (q, k, v, alpha), fast_mode=True)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v), (q, k, v), fast_mode=True)


# ------------------------------------------------------------------------------------------------ the kernel

def _gradients(run, leaves, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = run(*leaves)
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, lk, block_q, block_k, mask", SHAPES)
def test_error_budget(shape, lk, block_q, block_k, mask, dtype):
    q, k, v, block_map, key_mask = problem(shape, lk, dtype, block_q, block_k, mask=mask)
    dim = shape[3]
    weight, bias, upstream = torch.randn(dim, dim) * dim ** -0.5, torch.randn(dim), torch.randn(shape)
    weight, bias, upstream = weight.to(dtype), bias.to(dtype), upstream.to(dtype)
    alpha = torch.rand(shape[:3], dtype=torch.float32).to(dtype)
    for scope in SCOPES:
        for feature in FEATURES:
            config = Settings(block_q, block_k, feature, scope, dim ** -0.5)
            for branch in ("projection", "alpha"):
                extra = [weight, bias] if branch == "projection" else [alpha]
                names = ["proj_weight", "proj_bias"] if branch == "projection" else ["alpha"]

                def exact(compute, q, k, v, *extra, config=config, names=names):
                    named = dict(zip([n.removeprefix("proj_") for n in names], extra))
                    return at_precision(compute, q, k, v, block_map, config, key_mask=key_mask, **named)[0]

                def kernel(q, k, v, *extra, feature=feature, scope=scope, names=names):
                    return sparse_linear_attention(q, k, v, block_map, block_q, block_k, feature, scope,
                                                   key_mask=key_mask, backend="cpu", **dict(zip(names, extra)))

                leaves = [q, k, v, *extra]
                truth = _gradients(lambda *x, f=exact: f(torch.float64, *x), [x.double() for x in leaves], upstream)
                rough = _gradients(lambda *x, f=exact: f(dtype, *x), leaves, upstream)
                got = _gradients(kernel, leaves, upstream)
                for name, a, t, r in zip(("dq", "dk", "dv", *names), got, truth, rough):
                    # two roundings: block states are rounded once more than the reference's dense sums. The gradients
                    # of the projection sum over all rows and may cancel to little: one rounding of the terms.
                    terms = upstream.abs().sum((0, 1, 2)) if name.startswith("proj") else 2 * t.abs()
                    assert_within_budget(a, t, r, what=f"{name} {feature} {scope} {branch}",
                                         floor=torch.finfo(dtype).eps * float(terms.max()))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_of_every_part(scope, feature):
    """A loss on o, o_sparse, o_linear and lse together, with a mask and a projection."""
    q, k, v, block_map, key_mask = problem((2, 2, 100, 24), 77, block_q=32, block_k=16, mask=True)
    weight = torch.randn(24, 24)
    upstream = [torch.randn_like(q) for _ in range(3)] + [torch.randn(q.shape[:3])]

    def total(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, weight)]
        parts = sparse_linear_attention(*leaves[:3], block_map, 32, 16, feature, scope, leaves[3], key_mask=key_mask,
                                        return_parts=True, backend=backend)
        seen = parts[3].nan_to_num(neginf=0)
        loss = sum((g * p).sum() for g, p in zip(upstream, (*parts[:3], seen)))
        return torch.autograd.grad(loss, leaves)

    for name, a, b in zip(("dq", "dk", "dv", "dw"), total("cpu", torch.float32), total("reference", torch.float64)):
        assert_relative(a, b, 1e-5, name)


@pytest.mark.parametrize("part", range(4))
def test_gradient_of_one_part_alone(part):
    q, k, v, block_map, _ = problem((1, 2, 64, 16))
    block_map.fill_(1)
    grads = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        parts = sparse_linear_attention(*leaves, block_map, 64, 32, return_parts=True, backend=backend)
        grads.append(torch.autograd.grad(parts[part].square().sum(), leaves, allow_unused=True))
    for a, b in zip(*grads):
        assert_relative(a, b, 1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_and_keys_that_see_nothing_get_zero(backend):
    q, k, v, block_map, _ = problem((1, 2, 96, 16), block_q=32, block_k=32)
    block_map[:, :, 0] = torch.tensor([0, -1, 0], dtype=torch.int8)
    block_map[:, :, 1:] = torch.tensor([1, 0, 1], dtype=torch.int8)
    key_mask = torch.ones(1, 96, dtype=torch.bool)
    key_mask[:, 64:80] = False
    k[:, :, 64:80], v[:, :, 64:80] = math.nan, math.inf  # hidden: may hold anything
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o = sparse_linear_attention(q, k, v, block_map, 32, 32, key_mask=key_mask, backend=backend)
    dq, dk, dv = torch.autograd.grad(o.square().sum(), (q, k, v))
    assert not dq[:, :, :32].any() and dq[:, :, 32:].abs().amin() > 0
    for grad in (dk, dv):  # block 1 is critical for nobody, tokens 64..79 are hidden
        assert not grad[:, :, 32:80].any() and grad.isfinite().all()
        assert grad[:, :, :32].abs().amin() > 0 and grad[:, :, 80:].abs().amin() > 0


@pytest.mark.parametrize("layout", [strided, heads_last])
def test_layouts_give_the_same_bits(layout):
    q, k, v, block_map, key_mask = problem((2, 2, 100, 40), 77, mask=True)
    upstream = torch.randn_like(q)
    weight = torch.randn(40, 40)

    def run(q, k, v):
        return sparse_linear_attention(q, k, v, block_map, 64, 32, scope="marginal", proj_weight=weight,
                                       key_mask=key_mask)

    want = _gradients(run, (q, k, v), upstream)
    leaves = [layout(x).detach().requires_grad_() for x in (q, k, v)]
    for a, b in zip(torch.autograd.grad(run(*leaves), leaves, layout(upstream)), want):
        assert torch.equal(a, b)


def test_empty():
    for lq, lk in ((0, 8), (8, 0)):
        q, k = torch.randn(1, 2, lq, 16, requires_grad=True), torch.randn(1, 2, lk, 16, requires_grad=True)
        block_map = torch.ones(1, 2, -(-lq // 4), -(-lk // 4), dtype=torch.int8)
        o = sparse_linear_attention(q, k, k, block_map, 4, 4, proj_weight=torch.randn(16, 16))
        dq, dk = torch.autograd.grad(o.sum(), (q, k))
        assert dq.shape == q.shape and dk.shape == k.shape and not dq.any() and not dk.any()


def test_only_what_is_asked_for():
    """A frozen model with a trainable projection needs no pass over the attention."""
    q, k, v, block_map, _ = problem((1, 2, 64, 16))
    weight = torch.randn(16, 16, requires_grad=True)
    o = sparse_linear_attention(q, k, v, block_map, 64, 32, proj_weight=weight)
    with torch.profiler.profile() as profile:
        o.square().sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "triskele::sla_backward" not in names and weight.grad.abs().max() > 0


def test_direct_call_without_parts_says_so():
    q, k, v, block_map, _ = problem((1, 2, 64, 16))
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="expected parts=True"):
        sla_attention(q, k, v, block_map, torch.randn(16, 16), None, None, None, 64, 32, "elu", "all", 0.25, False,
                      "auto")


def test_opcheck():
    q, k, v, block_map, key_mask = problem((1, 2, 70, 16), mask=True)
    o_sparse, o_linear = torch.randn_like(q), torch.randn_like(q)
    lse, grad = torch.randn(1, 2, 70), torch.randn_like(q)
    settings = (64, 32, "relu", "marginal", 0.25)
    torch.library.opcheck(sla_backward, (q, k, v, block_map, o_sparse, o_linear, lse, grad, grad, lse, key_mask,
                                         *settings, "auto"))
    torch.library.opcheck(sla_backward, (q, k, v, block_map, o_sparse, None, lse, grad, None, None, None, *settings,
                                         "auto"))


def test_explain_names_the_backend():
    q, k, v, block_map, _ = problem((1, 1, 64, 8))
    config = Settings(64, 32, "softmax", "all", 1.0)
    choice = triskele.explain("sla.backward", q, k, v, block_map, q, None, q[..., 0], q, None, None, None, config)
    assert choice.chosen == "cpu" and "reference" in choice.reasons


@pytest.mark.parametrize("scope", SCOPES)
def test_same_bits_whatever_the_threads(scope):
    q, k, v, block_map, _ = problem((2, 3, 300, 48), block_q=32, block_k=32)
    weight, upstream, before = torch.randn(48, 48), torch.randn_like(q), torch.get_num_threads()

    def run(q, k, v, weight):
        return sparse_linear_attention(q, k, v, block_map, 32, 32, scope=scope, proj_weight=weight)

    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_gradients(run, (q, k, v, weight), upstream)[:3])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)
