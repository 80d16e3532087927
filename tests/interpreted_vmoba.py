"""The VMoBA kernels in Triton's interpreter, on CPU tensors. Run by test_triton_vmoba.py through interpreted.py, but
for what is marked slow; all of it by `python tests/interpreted_vmoba.py`.

The interpreter multiplies the raw bits of bfloat16, so float32 and float16 stand for all dtypes here.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from generators import heads_last, poisoned, strided, with_outliers
from test_vmoba_select import brute_force
from test_vmoba_vectors import CASES, SPECIAL_THRESHOLD, SPECIAL_TOPK, Case
from tolerance import assert_relative, assert_within_budget
from vmoba_cases import MODES, dense, draw, with_gradients

from triskele.ops import vmoba_partition, vmoba_select
from triskele.ops.vmoba import reference
from triskele.ops.vmoba.api import _layout
from triskele.triton_kernels import vmoba_backward, vmoba_forward, vmoba_lists, vmoba_pools
from triskele.triton_kernels import vmoba_select as kernels


def some(paths, step):
    """The others are slow."""
    return [p if i % step == 0 else pytest.param(p, marks=pytest.mark.slow) for i, p in enumerate(paths)]


def name(path):
    return path.stem[6:]


def choose(q, k, chunk, select, pool="query", top_k=1, threshold=1.0):
    order, bounds = _layout(chunk, q)
    return kernels.select(q, k, order, bounds, select, pool, min(top_k, len(bounds) - 1), threshold)


def run(q, k, v, do, chunk, mask):
    """o, lse, dq, dk, dv"""
    layout = _layout(chunk, q)
    o, lse = vmoba_forward.forward(q, k, v, *layout, mask)
    return o, lse, *vmoba_backward.backward(do, q, k, v, o, lse, *layout, mask)


# ---- selection


@pytest.mark.parametrize("path", some(CASES, 6) + SPECIAL_TOPK, ids=name)
def test_select_vectors(path):
    case = Case(path)
    for index, (begin, end) in enumerate(case.samples):
        q, k, _, _ = case.sequence(begin, end)
        got = choose(q, k, **case.settings)
        if case.own_pools:
            assert torch.equal(got, case.mask("gate_mask_before", index))
        else:  # the published pool spans the samples, ours ends with each
            assert torch.equal(got, vmoba_select(q, k, **case.settings, backend="reference"))


def test_select_threshold_never_reached():
    (path,) = SPECIAL_THRESHOLD
    case = Case(path)
    assert choose(*case.sequence(0, 192)[:2], **case.settings).all()


@pytest.mark.parametrize("select, pool", MODES)
def test_select_is_the_definition(select, pool):
    q, k = draw(2, 2, 24, 8, count=2)
    chunk = vmoba_partition((2, 3, 4), (2, 2, 2))
    for top_k, threshold in ((2, 0.5), (99, 1.0)):
        setting = {"top_k": top_k} if select == "topk" else {"threshold": threshold}
        got = choose(q, k, chunk, select, pool, **setting)
        assert torch.equal(got, brute_force(q, k, chunk, select, pool, **setting)), setting
    assert got.all()


@pytest.mark.parametrize("select, pool", MODES)
def test_select_ties_rank_by_chunk_head_token(select, pool):
    """Gates in {-8, 0, 8}, then all zero, which also makes the spread zero."""
    q = torch.randint(-1, 2, (1, 2, 30, 1)).float().expand(1, 2, 30, 8)
    k = torch.randint(0, 2, (1, 2, 5, 1)).float().repeat_interleave(6, 2).expand(1, 2, 30, 8)
    for queries, keys in ((q, k), (-q, k * 0)):
        setting = {"top_k": 3} if select == "topk" else {"threshold": 0.6}
        got = choose(queries, keys, 6, select, pool, **setting)
        assert torch.equal(got, brute_force(queries, keys, 6, select, pool, **setting))


@pytest.mark.parametrize("select, pool", MODES)
def test_select_beyond_one_tile(select, pool, monkeypatch):
    """More chunks than a tile of them, or more queries than a part; strides; float16."""
    monkeypatch.setattr(vmoba_pools, "SPAN", 1024)
    length, chunk, top_k = (34, 1, 20) if pool == "query" else (1100, 400, 2)
    q, k = draw(1, 1, length, 24, count=2, dtype=torch.float16)
    q = with_outliers(q, 30.0)
    setting = {"select": select, "pool": pool, "top_k": top_k, "threshold": 0.7}
    got = choose(heads_last(q), strided(k), chunk, **setting)
    assert torch.equal(got, vmoba_select(q, k, chunk=chunk, **setting, backend="reference"))


@pytest.mark.parametrize("select, pool", [MODES[0], MODES[2], MODES[3], MODES[5]])
def test_select_nan_gates_end_in_a_mask(select, pool):
    q, k = draw(1, 2, 40, 8, count=2)
    q[0, 0, 7, 3], k[0, 1, 33, 2] = float("nan"), float("inf")
    got = choose(q, k, 16, select, pool, top_k=2, threshold=0.3)
    assert (got.sum(1) >= 1).all()
    if select == "topk":
        assert torch.equal(got, vmoba_select(q, k, chunk=16, select=select, pool=pool, top_k=2, backend="reference"))


# ---- lists


@pytest.mark.parametrize("chunk", [90, vmoba_partition((6, 7, 8), (4, 3, 5)), 400], ids=["90", "partition", "one"])
def test_lists(chunk):
    length = 336  # more than one range
    q = torch.empty(2, 2, length, 8)
    order, bounds = _layout(chunk, q)
    chunks = len(bounds) - 1
    mask = torch.rand(2, chunks, 2, length) < 0.05
    seen = (mask | reference.self_mask(order, bounds, length)[None, :, None]).transpose(1, 2)  # [B, H, C, S]
    queries = vmoba_lists.chunk_queries(mask, order, bounds)
    starts = torch.arange(queries.ranges + 1) * queries.size
    for at in torch.cartesian_prod(*(torch.arange(n) for n in seen.shape[:3])).tolist():
        at = tuple(at)
        want = seen[at].nonzero()[:, 0].int()
        assert torch.equal(queries.lists[at][:len(want)], want)
        assert torch.equal(queries.starts[at], torch.searchsorted(want, starts).int())
    rows = 16
    tiles = [(c, p) for c in range(chunks) for p in range(int(bounds[c]), int(bounds[c + 1]), rows)]
    got = vmoba_lists.key_tiles(bounds, length, rows)
    assert got[:len(tiles)].tolist() == [list(t) for t in tiles] and (got[len(tiles):, 0] == -1).all()


# ---- attention


SHAPES = {  # [B, H, S, D], chunk
    "ragged": ((2, 2, 131, 16), 40),
    "partition": ((1, 2, 180, 72), vmoba_partition((3, 6, 10), (2, 3, 4))),
    "small chunks": ((1, 1, 70, 64), vmoba_partition((2, 5, 7), (1, 2, 2))),
    "long chunks": ((1, 1, 300, 128), 150),
    "tiles end with chunks": ((1, 1, 256, 32), 64),
    "one token": ((2, 1, 1, 8), 5),
    "one chunk": ((1, 2, 65, 80), 400),
    "two ranges": ((1, 1, 270, 8), 100),
}


@pytest.mark.parametrize("dtype, outliers", [(torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_budget(shape, outliers, dtype):
    sizes, chunk = SHAPES[shape]
    q, k, v, do = draw(*sizes, count=4, dtype=dtype)
    if outliers:
        q, v, do = with_outliers(q, 10.0, 0.02), with_outliers(v, 20.0), with_outliers(do, 20.0)
    mask = vmoba_select(q, k, chunk=chunk, select="threshold", pool="head", threshold=0.4, backend="reference")
    truth = with_gradients(lambda *x: dense(*x, mask, chunk), (q.double(), k.double(), v.double()), do)
    same = with_gradients(lambda *x: dense(*x, mask, chunk), (q, k, v), do)
    o, lse, *grads = run(q, k, v, do, chunk, mask)
    for name, a, t, s in zip(("o", "dq", "dk", "dv"), (o, *grads), truth, same):
        assert a.dtype == dtype and a.is_contiguous()
        # The backward has P = exp(S - lse) from a rounded lse and D = rowsum(dO O) from a rounded O; autograd, which is
        # "same", kept P, and sums D from the same P dP that it is subtracted from.
        assert_within_budget(a, t, s, factor=2.0 if name == "o" else 8.0, what=name)
    _, want = reference.attention(q, k, v, *_layout(chunk, q), mask)
    assert lse.dtype == torch.float32
    assert_within_budget(lse, want.double(), want, floor=3e-6 * max(1.0, float(want.abs().max())))


def test_own_chunk_stays_where_the_mask_leaves_it_out():
    q, k, v, do = draw(1, 2, 60, 8, count=4)
    nothing, own = torch.zeros(1, 4, 2, 60, dtype=torch.bool), choose(q, k, 16, "topk")
    assert own.sum() == 120
    for a, b in zip(run(q, k, v, do, 16, nothing), run(q, k, v, do, 16, own)):
        assert torch.equal(a, b)


def test_layouts_and_margins_change_no_bit():
    chunk = vmoba_partition((2, 5, 7), (2, 3, 4))
    q, k, v, do = draw(2, 1, 70, 40, count=4)
    mask = torch.rand(2, chunk.num_chunks, 1, 70) < 0.4
    plain = run(q, k, v, do, chunk, mask)
    for layout in (strided, heads_last, poisoned):
        tensors = [layout(x) for x in (q, k, v)]
        how = chunk.order, chunk.bounds, mask if layout is poisoned else layout(mask)
        o, lse = vmoba_forward.forward(*tensors, *how)
        grads = vmoba_backward.backward(layout(do), *tensors, layout(o), layout(lse), *how)
        for a, b in zip((o, lse, *grads), plain):
            assert torch.equal(a, b), layout.__name__


def test_chunks_that_a_query_does_not_see_are_not_read():
    q, k, v, do = draw(1, 2, 100, 16, count=4)
    mask = torch.ones(1, 4, 2, 100, dtype=torch.bool)
    mask[:, 2] = False
    seen = torch.arange(100) // 28 != 2
    clean = run(q, k, v, do, 28, mask)
    k[:, :, ~seen], v[:, :, ~seen] = float("nan"), float("nan")
    dirty = run(q, k, v, do, 28, mask)
    for a, b in zip(clean[:3], dirty[:3]):  # o, lse, dq
        assert torch.equal(a[:, :, seen], b[:, :, seen]) and b[:, :, ~seen].isnan().all()


@pytest.mark.parametrize("shape", [(0, 2, 40, 8), (2, 0, 40, 8), (2, 2, 0, 8)])
def test_empty(shape):
    q, k, v, do = draw(*shape, count=4)
    for select, pool in MODES:
        mask = choose(q, k, 16, select, pool, 2, 0.5)
        assert mask.shape == (shape[0], -(-shape[2] // 16), *shape[1:3])
    for result in run(q, k, v, do, 16, mask):
        assert result.numel() == 0 and result.shape[:3] == shape[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("path", some(CASES, 9), ids=name)
def test_vectors(path, dtype):
    case = Case(path)
    parts = []
    for index, (begin, end) in enumerate(case.samples):
        o, _, *grads = run(*case.sequence(begin, end, dtype), case.chunk, case.mask("gate_mask_before", index))
        parts.append((o, *grads))
    exact = dtype == torch.float32
    case.check_stored([torch.cat(x, 2) for x in zip(*parts)], *((1e-5, 1e-5) if exact else (2e-2, 3e-2)))


def test_gradients_against_float64():
    q, k, v, do = draw(1, 2, 150, 24, count=4)
    chunk = vmoba_partition((5, 5, 6), (2, 3, 3))
    order, bounds = _layout(chunk, q)
    mask = torch.rand(1, chunk.num_chunks, 2, 150) < 0.3
    wide = [x.double() for x in (q, k, v)]
    want = reference.attention_backward(do.double(), *wide, *reference.attention(*wide, order, bounds, mask), order,
                                        bounds, mask)
    for name, a, b in zip(("dq", "dk", "dv"), run(q, k, v, do, chunk, mask)[2:], want):
        assert_relative(a, b, 2e-6, name)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
