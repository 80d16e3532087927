"""csrc/cuda/sla_route_sm80.cu, run thread by thread on the CPU: the CPU kernel's maps bit by bit, and block lists."""

from __future__ import annotations

import itertools
import math

import emulated
import pytest
import torch
from conftest import Vectors, vector_files
from generators import heads_last, poisoned, strided
from sla_cases import Published

from triskele import _native, backend
from triskele.ops import route_blocks
from triskele.ops.sla.op import _fitting

CASES = vector_files("attention", "sla_main_*")[:1] + vector_files("attention", "sla_sla1_*")[:1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def route(q, k, n_keep, n_drop=0, block_q=128, block_k=64, keep_keys=None, key_mask=None):
    return emulated.load("sla_route_sm80").sla_route(q, k, n_keep, n_drop, _fitting(block_q, q), _fitting(block_k, k),
                                                     keep_keys, key_mask)


def on_cpu(q, k, n_keep, n_drop=0, block_q=128, block_k=64, keep_keys=None, key_mask=None):
    assert not _native.cpu_library()
    if q.dtype == torch.float16:
        q, k = q.float(), k.float()
    return torch.ops.triskele_native.sla_route(q, k, n_keep, n_drop, _fitting(block_q, q), _fitting(block_k, k),
                                               keep_keys, key_mask)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_vectors(path):
    case = Published(Vectors(path), torch.bfloat16)
    columns = case.map.shape[-1]
    got = route(case.q, case.k, min(columns, max(1, math.floor(case.keep * columns))), **case.blocks)
    assert torch.equal(got, case.map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, heads, lq, lk, dim, block_q, block_k", [
    (2, 2, 200, 333, 64, 64, 16),    # ragged last blocks
    (1, 2, 130, 1100, 128, 32, 8),   # more than a tile of keys
    (1, 1, 70, 63, 7, 1, 2),         # a head_dim that no 16 bytes divide; blocks of one token
    (2, 1, 33, 40, 256, 7, 5),
])
def test_the_cpu_kernels_maps(batch, heads, lq, lk, dim, block_q, block_k, dtype):
    q, k = torch.randn(batch, heads, lq, dim).to(dtype), torch.randn(batch, heads, lk, dim).to(dtype)
    mask, keep = torch.rand(batch, lk) > 0.4, torch.rand(batch, lk) > 0.95
    mask[0, :2 * block_k] = False
    k[~mask[:, None, :, None].expand_as(k)] = math.nan     # what nobody sees may hold anything
    columns = -(-lk // block_k)
    for n_keep, n_drop in ((1, 0), (columns // 4, columns // 2), (columns // 2, columns), (columns, columns // 3),
                           (0, columns + 3)):
        for keys in (None, keep, keep[:1]):
            arguments = (q, k, n_keep, n_drop, block_q, block_k, keys, mask)
            assert torch.equal(route(*arguments), on_cpu(*arguments)), (n_keep, n_drop)
    k = k.nan_to_num(0.5)
    assert torch.equal(route(q, k, 2, 1, block_q, block_k), on_cpu(q, k, 2, 1, block_q, block_k))


def test_ties_rank_by_index():
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 4, 8).repeat(1, 1, 70, 1)           # seventy equal blocks
    for n_keep, n_drop in ((3, 4), (33, 30), (64, 6), (1, 0)):
        got = route(q, k, n_keep, n_drop, 8, 4)
        row = torch.tensor([1] * n_keep + [0] * (70 - n_keep - n_drop) + [-1] * n_drop, dtype=torch.int8)
        assert (got == row).all()
    q, k = torch.zeros(1, 1, 8, 8), torch.randn(1, 1, 40, 8)                                # scores of 0 and of -0
    assert torch.equal(route(q, k, 2, 3, 8, 4), on_cpu(q, k, 2, 3, 8, 4))
    coarse = torch.randint(-1, 2, (1, 2, 300, 8)).float()                                   # ties among others
    for n_keep in (5, 20, 100):
        assert torch.equal(route(coarse, coarse, n_keep, 40, 4, 2), on_cpu(coarse, coarse, n_keep, 40, 4, 2))


def test_half_inputs_are_scored_wider():
    q = torch.ones(1, 1, 4, 2, dtype=torch.bfloat16)
    k = torch.tensor([[1.0, 0.0], [1.0, 2 ** -12]], dtype=torch.bfloat16)[None, None].repeat_interleave(4, 2)
    assert torch.equal(route(q, k, 1, 0, 4, 4)[0, 0, 0], torch.tensor([0, 1]))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_ranks_as_in_the_cpu_kernel(poison):
    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    q[0, 0, 3], k[0, :, 40:200:7] = poison, poison
    mask = torch.ones(1, 300, dtype=torch.bool)
    mask[0, 80:100] = False
    for n_keep in (1, 22, 70):
        got = route(q, k, n_keep, 22, 8, 4, None, mask)
        assert torch.equal(got, on_cpu(q, k, n_keep, 22, 8, 4, None, mask))


@pytest.mark.parametrize("layout", [strided, heads_last, poisoned])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    q, k = torch.randn(2, 3, 70, 24).to(dtype), torch.randn(2, 3, 50, 24).to(dtype)
    want = on_cpu(q, k, 2, 1, 16, 8)
    assert torch.equal(route(layout(q), layout(k), 2, 1, 16, 8), want)


def test_rows_that_shared_memory_does_not_hold_and_any_order():
    q, k = torch.randn(1, 1, 2, 1), torch.randn(1, 1, 4200, 1)
    assert torch.equal(route(q, k, 300, 1000, 1, 1), on_cpu(q, k, 300, 1000, 1, 1))
    q, k = torch.randn(1, 1, 70, 8), torch.randn(1, 1, 90, 8)
    want = on_cpu(q, k, 3, 5, 4, 2)
    for name in ("backward", "random"):
        with emulated.order(name, 3):
            assert torch.equal(route(q, k, 3, 5, 4, 2), want)


@pytest.mark.parametrize("lq, lk", [(0, 8), (8, 0), (0, 0)])
def test_empty(lq, lk):
    got = route(torch.zeros(1, 2, lq, 8), torch.zeros(1, 2, lk, 8), 1, 0, 4, 4)
    assert got.shape == (1, 2, -(-lq // 4), -(-lk // 4))


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 40), (37, 33), (70, 5), (9, 64)])
def test_lists_of_critical_blocks(rows, columns):
    ops = emulated.load("sla_route_sm80")
    block_map = torch.randint(-1, 2, (2, 2, rows, columns), dtype=torch.int8)
    block_map[0, 0, -1], block_map[0, 1, :, 0] = 0, 1
    by_row, row_counts, by_column, column_counts = ops.sla_lists(block_map)
    critical = block_map == 1
    assert torch.equal(row_counts, critical.sum(3).int()) and torch.equal(column_counts, critical.sum(2).int())
    for b, h in itertools.product(range(2), range(2)):
        for i in range(rows):
            assert by_row[b, h, i, :row_counts[b, h, i]].tolist() == critical[b, h, i].nonzero()[:, 0].tolist()
        for j in range(columns):
            assert by_column[b, h, j, :column_counts[b, h, j]].tolist() == critical[b, h, :, j].nonzero()[:, 0].tolist()


def test_the_native_op_guards_itself():
    q, ops = torch.randn(1, 1, 8, 4), emulated.load("sla_route_sm80")
    for change, message in ((dict(k=q.half()), "k of the dtype of q"),
                            (dict(q=q.double(), k=q.double()), "float32, float16 or bfloat16"),
                            (dict(k=torch.randn(1, 2, 8, 4)), "heads of k: expected 1, got 2"),
                            (dict(block_q=0), "blocks of at least one token"),
                            (dict(key_mask=torch.ones(1, 7, dtype=torch.bool)), "key_mask elements: expected 8, got 7"),
                            (dict(keep_keys=torch.ones(2, 8, dtype=torch.bool)), "keep_keys for one or every batch")):
        call = dict(q=q, k=q, n_keep=1, n_drop=0, block_q=4, block_k=4, keep_keys=None, key_mask=None) | change
        with pytest.raises(RuntimeError, match=message):
            ops.sla_route(*call.values())


def test_the_entry_says_why_not():
    q = torch.randn(1, 1, 8, 4)
    assert backend.explain("sla.route", q, q, 1, 0, 4, 4, None, None).reasons["cuda"] == ["takes cuda tensors, got cpu"]
    entry = {e.name: e for e in backend.TABLES["sla.route"]}["cuda"]
    assert entry.why_not(q, q, 1, 0, 4, 4, None, None) == []
    assert entry.why_not(q.double(), q.double(), 1, 0, 4, 4, None, None) == [
        "takes float32, float16 and bfloat16, got torch.float64"]
    assert torch.equal(route(q, q, 1, 0, 4, 4), route_blocks(q, q, keep=1, block_q=4, block_k=4, backend="cpu"))
