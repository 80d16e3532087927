"""Sparse-linear attention, forward: published vectors, error budgets, hostile inputs, the custom op's contract."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Vectors, vector_files
from generators import heads_last, poisoned, strided, with_outliers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sla_cases import FEATURES, SCOPES, SHAPES, Published, at_precision, problem
from tolerance import assert_relative, assert_within_budget

import triskele
from triskele.nn import SparseLinearAttention
from triskele.ops import route_blocks, sparse_linear_attention
from triskele.ops.sla.op import sla_attention
from triskele.ops.sla.reference import Settings

CASES = vector_files("attention", "sla_main_*") + vector_files("attention", "sla_sla1_*")


# ------------------------------------------------------------------------------------------------ published vectors

def _check_forward(case: Published, parts, tolerance, lse_tolerance):
    for name, actual in zip(("o", "o_s", "o_l"), parts):
        assert_relative(actual[:, :, case.rows], case.vectors[name], tolerance, name)
        assert_relative(actual.double().mean(-1), case.vectors[f"rowmean_{name}"], tolerance, f"rowmean_{name}")
    assert parts[3].dtype == torch.float32
    assert_relative(parts[3] / math.log(2), case.vectors["lse2"], lse_tolerance, "lse2")


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float32), ("reference", torch.float16),
                                            ("cpu", torch.float32), ("cpu", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_vectors(path, backend, dtype):
    case = Published(Vectors(path), dtype)
    parts = case.attend(backend, return_parts=True)
    exact = dtype == torch.float32 and not case.half
    _check_forward(case, parts, 1e-5 if exact else 2e-2, 1e-6 if exact else 1e-3)
    o = case.attend(backend)
    assert torch.equal(o, parts[0])  # the parts change nothing


def test_fp16_vectors_are_there():
    assert sum(Published(Vectors(p), torch.float32).half for p in CASES) == 2


# ------------------------------------------------------------------------------------------------ error budget

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, lk, block_q, block_k, mask", SHAPES)
def test_error_budget(shape, lk, block_q, block_k, mask, dtype):
    q, k, v, block_map, key_mask = problem(shape, lk, dtype, block_q, block_k, mask=mask)
    dim = shape[3]
    weight, bias, alpha = torch.randn(dim, dim) * dim ** -0.5, torch.randn(dim), torch.rand(shape[:3])
    for scope in SCOPES:
        for feature in FEATURES:
            config = Settings(block_q, block_k, feature, scope, dim ** -0.5)
            for branch in ({"weight": weight, "bias": bias}, {"alpha": alpha}):
                truth = at_precision(torch.float64, q, k, v, block_map, config, key_mask=key_mask, **branch)
                same = at_precision(dtype, q, k, v, block_map, config, key_mask=key_mask, **branch)
                named = {f"proj_{n}" if n != "alpha" else n: x for n, x in branch.items()}
                got = sparse_linear_attention(q, k, v, block_map, block_q, block_k, feature, scope, key_mask=key_mask,
                                              return_parts=True, backend="cpu", **named)
                for name, actual, want, rough in zip(("o", "o_sparse", "o_linear"), got, truth, same):
                    assert_within_budget(actual, want, rough, what=f"{name} {feature} {scope} {sorted(named)}")
                finite = ~truth[3].isinf()
                assert torch.equal(got[3].isinf(), ~finite)
                assert_within_budget(got[3][finite], truth[3][finite], truth[3][finite].float(), floor=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outliers(dtype):
    q, k, v, *_ = problem((1, 2, 192, 64), dtype=dtype)
    q, k, v = with_outliers(q, 30), with_outliers(k, 30), with_outliers(v)
    block_map = route_blocks(q, k, keep=0.4, block_q=64, block_k=32)
    for scope in SCOPES:
        for feature in FEATURES:
            config = Settings(64, 32, feature, scope, 0.125)
            truth = at_precision(torch.float64, q, k, v, block_map, config)
            same = at_precision(dtype, q, k, v, block_map, config)
            got = sparse_linear_attention(q, k, v, block_map, 64, 32, feature, scope, return_parts=True, backend="cpu")
            for name, actual, want, rough in zip(("o", "o_sparse", "o_linear"), got, truth, same):
                assert_within_budget(actual, want, rough, what=f"{name} {feature} {scope}")


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.integers(1, 80), st.integers(1, 80),
       st.sampled_from(FEATURES), st.sampled_from(SCOPES), st.booleans())
def test_any_shape(lq, lk, dim, block_q, block_k, feature, scope, mask):
    q, k, v, block_map, key_mask = problem((1, 2, lq, dim), lk, block_q=block_q, block_k=block_k, mask=mask)
    args = block_map, block_q, block_k, feature, scope
    got = sparse_linear_attention(q, k, v, *args, key_mask=key_mask, return_parts=True, backend="cpu")
    want = sparse_linear_attention(q.double(), k.double(), v.double(), *args, key_mask=key_mask, return_parts=True,
                                   backend="reference")
    for name, a, w in zip(("o", "o_sparse", "o_linear", "lse"), got, want):
        assert torch.equal(a.isinf(), w.isinf()) and not a.isnan().any()
        assert_relative(a.nan_to_num(neginf=0), w.nan_to_num(neginf=0), 1e-5, name)


# ------------------------------------------------------------------------------------------------ hostile inputs

@pytest.mark.parametrize("layout", [strided, heads_last, poisoned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_bits(layout, dtype):
    q, k, v, block_map, key_mask = problem((2, 2, 100, 40), 77, dtype, mask=True)
    plain = [sparse_linear_attention(q, k, v, block_map, 64, 32, scope="marginal", key_mask=m, return_parts=True)
             for m in (None, key_mask)]
    q, k, v = layout(q), layout(k), layout(v)
    block_map, key_mask = strided(block_map), strided(key_mask)
    for want, m in zip(plain, (None, key_mask)):
        got = sparse_linear_attention(q, k, v, block_map, 64, 32, scope="marginal", key_mask=m, return_parts=True)
        for a, b in zip(got, want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_keys_may_hold_anything(backend):
    q, k, v, block_map, key_mask = problem((2, 2, 100, 32), mask=True)
    hidden = ~key_mask[:, None, :, None].expand_as(k)
    for scope in SCOPES:
        want = sparse_linear_attention(q, k, v, block_map, 64, 32, scope=scope, key_mask=key_mask, return_parts=True,
                                       backend=backend)
        poisoned_k, poisoned_v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf)
        got = sparse_linear_attention(q, poisoned_k, poisoned_v, block_map, 64, 32, scope=scope, key_mask=key_mask,
                                      return_parts=True, backend=backend)
        for a, b in zip(got, want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_without_critical_keys_are_zero(backend):
    q, k, v, block_map, _ = problem((1, 2, 96, 16), block_q=32, block_k=32)
    block_map[:, :, 0] = torch.tensor([0, -1, 0], dtype=torch.int8)  # no critical block
    block_map[:, :, 1] = torch.tensor([1, 0, 0], dtype=torch.int8)  # its keys are all masked
    block_map[:, :, 2] = 1
    key_mask = torch.ones(1, 96, dtype=torch.bool)
    key_mask[:, :32] = False
    _, o_sparse, o_linear, lse = sparse_linear_attention(q, k, v, block_map, 32, 32, key_mask=key_mask,
                                                         scope="complement", return_parts=True, backend=backend)
    assert torch.equal(o_sparse[:, :, :64], torch.zeros_like(o_sparse[:, :, :64]))
    assert (lse[:, :, :64] == -math.inf).all() and lse[:, :, 64:].isfinite().all()
    assert torch.equal(o_linear[:, :, 64:], torch.zeros_like(o_linear[:, :, 64:]))  # nothing left for it
    assert o_linear[:, :, :64].abs().min() > 0 and o_sparse[:, :, 64:].abs().min() > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_denominator(backend):
    """relu features that never meet: phi(q) Z is exactly zero beside large critical blocks."""
    q, k, v = -torch.ones(1, 1, 64, 8), torch.randn(1, 1, 64, 8) * 1e3, torch.randn(1, 1, 64, 8)
    block_map = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8)[None, None]
    for scope in ("complement", "marginal"):
        o_linear = sparse_linear_attention(q, k, v, block_map, 32, 32, "relu", scope, return_parts=True,
                                           backend=backend)[2]
        assert torch.equal(o_linear, torch.zeros_like(o_linear))


def test_small_complement_beside_large_critical_blocks():
    """The complement's sum is 1e-7 of the total: total minus critical would leave noise."""
    q, k, v, *_ = problem((1, 1, 64, 16))
    k[:, :, :32] -= 16  # elu(x) + 1 = e^x: tiny features in block 0
    block_map = torch.tensor([[0, 1]], dtype=torch.int8).expand(1, 1, 2, 2).contiguous()
    got = sparse_linear_attention(q, k, v, block_map, 32, 32, "elu", "complement", return_parts=True)[2]
    want = at_precision(torch.float64, q, k, v, block_map, Settings(32, 32, "elu", "complement", 0.25))[2]
    assert_relative(got, want, 1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("batch, lq, lk", [(0, 8, 8), (1, 0, 8), (1, 8, 0), (0, 0, 0)])
def test_empty(batch, lq, lk, backend):
    q, k = torch.randn(batch, 2, lq, 16), torch.randn(batch, 2, lk, 16)
    block_map = route_blocks(q, k, block_q=4, block_k=4, backend=backend)
    assert block_map.shape == (batch, 2, -(-lq // 4), -(-lk // 4))
    for scope in SCOPES:
        o, _, o_linear, lse = sparse_linear_attention(q, k, k, block_map, 4, 4, scope=scope, return_parts=True,
                                                      backend=backend)
        assert o.shape == q.shape and o_linear.shape == q.shape
        assert not o.any() and not o_linear.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_blocks_longer_than_the_sequence_are_the_sequence(backend):
    q, k, v, *_ = problem((1, 2, 20, 8), 30)
    block_map, huge = torch.zeros(1, 2, 1, 1, dtype=torch.int8), 2 ** 63 - 1
    want = sparse_linear_attention(q, k, v, block_map, 20, 30, proj_weight=torch.eye(8), backend=backend)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = sparse_linear_attention(q, k, v, block_map, huge, huge, proj_weight=torch.eye(8), backend=backend)
    assert torch.equal(got, want)
    assert all(g.any() for g in torch.autograd.grad(got.square().sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keep_everything_is_dense(dtype):
    q, k, v, *_ = problem((2, 2, 130, 48), 99, dtype)
    block_map = route_blocks(q, k, keep=1.0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_within_budget(sparse_linear_attention(q, k, v, block_map), exact, dense)


def test_alpha_ends():
    q, k, v, block_map, _ = problem((2, 3, 70, 24))
    parts = sparse_linear_attention(q, k, v, block_map, 64, 32, return_parts=True)
    for alpha, want in ((1.0, parts[1]), (torch.zeros(3, 1), parts[2])):
        assert torch.equal(sparse_linear_attention(q, k, v, block_map, 64, 32, alpha=alpha), want)


def test_nan_stays_where_it_enters():
    q, k, v, block_map, _ = problem((1, 1, 96, 16), block_q=32, block_k=32)
    q[0, 0, 5, 3] = math.nan
    got = sparse_linear_attention(q, k, v, block_map.fill_(1), 32, 32, return_parts=True)
    rows = torch.arange(96) != 5
    for part in got:
        assert part[0, 0, 5].isnan().all() and part[0, 0, rows].isfinite().all()


# ------------------------------------------------------------------------------------------------ bad inputs

BAD = [
    (dict(q=torch.zeros(1, 1, 8)), "q: expected 4 dimensions"),
    (dict(q=torch.zeros(1, 1, 8, 4, dtype=torch.int32)), "q: expected a floating-point dtype"),
    (dict(q=torch.zeros(1, 1, 8, 0), k=torch.zeros(1, 1, 8, 0), v=torch.zeros(1, 1, 8, 0)), r"head_dim D in 1\.\.256"),
    (dict(q=torch.zeros(1, 1, 8, 257)), r"head_dim D in 1\.\.256, got 257"),
    (dict(k=torch.zeros(1, 1, 8, 5)), "k: expected shape"),
    (dict(k=torch.zeros(1, 2, 8, 4)), "k: expected shape"),
    (dict(v=torch.zeros(1, 1, 9, 4)), "v: expected shape"),
    (dict(v=torch.zeros(1, 1, 8, 4, dtype=torch.bfloat16)), "v: expected the dtype of q"),
    (dict(v=torch.zeros(1, 1, 8, 4, device="meta")), "v: expected the device of q"),
    (dict(map=torch.ones(1, 1, 2, 2)), "map: expected dtype torch.int8"),
    (dict(map=torch.ones(1, 1, 2, 3, dtype=torch.int8)), "map: expected shape"),
    (dict(map=torch.full((1, 1, 2, 2), 2, dtype=torch.int8)), "map: expected values -1, 0 or 1"),
    (dict(map=torch.full((1, 1, 2, 2), -2, dtype=torch.int8)), "map: expected values -1, 0 or 1"),
    (dict(block_q=0), "block_q: expected an integer >= 1"),
    (dict(block_k=True), "block_k: expected an integer >= 1"),
    (dict(feature_map="gelu"), "feature_map: expected one of"),
    (dict(scope="most"), "scope: expected one of"),
    (dict(backend="gpu"), "backend: expected one of"),
    (dict(proj_weight=torch.zeros(4, 5)), "proj_weight: expected shape"),
    (dict(proj_bias=torch.zeros(4)), "proj_bias: expected proj_weight beside it"),
    (dict(proj_weight=torch.zeros(4, 4), proj_bias=torch.zeros(5)), "proj_bias: expected shape"),
    (dict(proj_weight=torch.zeros(4, 4), alpha=torch.ones(1)), "alpha: expected None together with proj_weight"),
    (dict(alpha=torch.ones(7)), "alpha: expected broadcastable"),
    (dict(alpha=torch.ones(1, 1, 1, 8)), "alpha: expected broadcastable"),
    (dict(alpha=torch.ones(8, dtype=torch.int64)), "alpha: expected a floating-point dtype"),
    (dict(key_mask=torch.ones(1, 8)), "key_mask: expected dtype torch.bool"),
    (dict(key_mask=torch.ones(2, 8, dtype=torch.bool)), "key_mask: expected shape"),
    (dict(alpha=True), "alpha: expected a tensor, got bool"),
    (dict(scale=math.nan), "scale: expected a finite number"),
    (dict(scale=True), "scale: expected a finite number"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = dict(q=torch.zeros(1, 1, 8, 4), k=torch.zeros(1, 1, 8, 4), v=torch.zeros(1, 1, 8, 4),
                map=torch.ones(1, 1, 2, 2, dtype=torch.int8), block_q=4, block_k=4)
    sparse_linear_attention(**call)
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(**{**call, **change})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_refused_dtypes_list_reasons(dtype):
    q, k, v, block_map, _ = problem((1, 1, 64, 8))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with pytest.raises(NotImplementedError, match=f"takes float32 and bfloat16, got {dtype}"):
        sparse_linear_attention(q, k, v, block_map, 64, 32)
    assert sparse_linear_attention(q, k, v, block_map, 64, 32, backend="reference").dtype == dtype
    with pytest.raises(NotImplementedError, match="backend='cuda' was asked for"):
        sparse_linear_attention(q, k, v, block_map, 64, 32, backend="cuda")


def test_native_op_checks_its_own_arguments():
    q, k, v, block_map, _ = problem((1, 1, 64, 8))
    sparse_linear_attention(q, k, v, block_map, 64, 32)  # loads the library
    native = torch.ops.triskele_native.sla_forward
    rest = (None, None, None, None, 64, 32, 0, 0, 1.0, False)
    with pytest.raises(RuntimeError, match="map key blocks"):
        native(q, k, v, block_map[..., :1].contiguous(), *rest)
    with pytest.raises(RuntimeError, match="an int8 map"):
        native(q, k, v, block_map.int(), *rest)
    with pytest.raises(RuntimeError, match="keys"):
        native(q, k, v[:, :, :5], block_map, *rest)


# ------------------------------------------------------------------------------------------------ op and module

@pytest.mark.parametrize("scope", SCOPES)
def test_opcheck(scope):
    q, k, v, block_map, key_mask = problem((1, 2, 70, 16), mask=True)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    weight, bias = torch.randn(16, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    settings = (64, 32, "softmax", scope, 0.25)
    for branch in ((weight, bias, None), (None, None, torch.rand(1, 2, 70, requires_grad=True)), (None, None, None)):
        torch.library.opcheck(sla_attention, (q, k, v, block_map, *branch, key_mask, *settings, True, "auto"))
    torch.library.opcheck(sla_attention, (q, k, v, block_map, None, None, None, None, *settings, False, "auto"))


@pytest.mark.parametrize("linear, dynamic", [("proj", None), ("proj", True), ("alpha", True)])
def test_compile_fullgraph(linear, dynamic):
    q, k, v, *_ = problem((1, 2, 70, 16))
    module = SparseLinearAttention(16, triskele.SLA(keep=0.5, block_q=16, block_k=16, linear=linear), num_heads=2)
    torch.nn.init.normal_(next(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    got, want = compiled(*inputs[0]), module(*inputs[1])
    assert torch.equal(got, want)
    got.square().sum().backward()
    grads = [x.grad for x in inputs[0]]
    want.square().sum().backward()
    for a, x in zip(grads, inputs[1]):
        assert torch.equal(a, x.grad)


def test_explain_names_the_backend():
    q, k, v, block_map, _ = problem((1, 1, 64, 8))
    settings = Settings(64, 32, "softmax", "all", 1.0)
    choice = triskele.explain("sla.forward", q, k, v, block_map, None, None, None, None, settings, False)
    assert choice.chosen == "cpu" and "reference" in choice.reasons


@pytest.mark.parametrize("linear", ["proj", "alpha", "none"])
def test_module_starts_as_the_sparse_branch(linear):
    q, k, v, *_ = problem((2, 4, 90, 16))
    module = SparseLinearAttention(16, triskele.SLA(keep=1.0, linear=linear), num_heads=4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_relative(module(q, k, v), dense, 1e-6)
    few = SparseLinearAttention(16, triskele.SLA(keep=0.3, block_q=16, block_k=16, linear=linear), num_heads=4)
    block_map = route_blocks(q, k, keep=0.3, block_q=16, block_k=16)
    assert torch.equal(few(q, k, v), sparse_linear_attention(q, k, v, block_map, 16, 16))
    short = SparseLinearAttention(16, triskele.SLA(linear=linear))  # three tokens: one short block
    assert_relative(short(q[:, :, :3], k[:, :, :3], v[:, :, :3]),
                    torch.nn.functional.scaled_dot_product_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3]), 1e-6)


def test_module_state_and_masks():
    config = triskele.SLA(keep=1, block_q=16, block_k=16, linear="proj")
    module = SparseLinearAttention(16, config)
    assert {n: tuple(p.shape) for n, p in module.state_dict().items()} == {"proj.weight": (16, 16), "proj.bias": (16,)}
    alpha = SparseLinearAttention(16, triskele.SLA(linear="alpha"), num_heads=3)
    assert {n: tuple(p.shape) for n, p in alpha.state_dict().items()} == {"alpha": (3, 1)}
    assert not SparseLinearAttention(16, triskele.SLA(linear="none")).state_dict()
    q, k, v, *_ = problem((1, 2, 64, 16))
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[:, 40:] = False
    got = module(q, k, v, keep_keys=[(0, 64)], key_mask=mask)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :40], v[:, :, :40])
    assert_relative(got, dense, 1e-6)


def test_module_alpha_learns_from_outside_the_interval():
    q, k, v, *_ = problem((1, 2, 64, 16))
    module = SparseLinearAttention(16, triskele.SLA(keep=1, block_q=16, block_k=16, linear="alpha"), num_heads=2)
    with torch.no_grad():
        module.alpha.fill_(1.5)
    sparse = sparse_linear_attention(q, k, v, route_blocks(q, k, 1, block_q=16, block_k=16), 16, 16)
    out = module(q, k, v)
    assert_relative(out, sparse, 1e-6)
    out.square().sum().backward()
    assert (module.alpha.grad != 0).all()


@pytest.mark.parametrize("head_dim", [0, 257, 1.5])
def test_module_bad_head_dim(head_dim):
    with pytest.raises(ValueError, match="head_dim"):
        SparseLinearAttention(head_dim)


def test_same_bits_whatever_the_threads():
    q, k, v, block_map, _ = problem((2, 3, 300, 48), block_q=32, block_k=32)
    weight, before = torch.randn(48, 48), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([sparse_linear_attention(q, k, v, block_map, 32, 32, scope=s, proj_weight=weight)
                            for s in SCOPES])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)
