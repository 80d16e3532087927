"""Block routing: published maps, counts, ties, kept and hidden keys, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Vectors, vector_files
from generators import heads_last, poisoned, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from sla_cases import Published

import triskele
from triskele.ops import route_blocks
from triskele.ops.sla.op import sla_route

CASES = vector_files("attention", "sla_main_*") + vector_files("attention", "sla_sla1_*")
BACKENDS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_vectors(path):
    for backend in BACKENDS:
        for dtype in DTYPES:  # the inputs are bfloat16 values: every dtype holds them (float16 to within its range)
            case = Published(Vectors(path), dtype)
            got = route_blocks(case.q, case.k, keep=case.keep, **case.blocks, backend=backend)
            assert got.dtype == torch.int8 and torch.equal(got, case.map), (backend, dtype)


def _by_hand(q, k, n_keep, n_drop, block_q, block_k, kept=(), hidden=()):
    """The definition, one block at a time."""
    q, k = q.double(), k.double()
    rows = [q[start:start + block_q].mean(0) for start in range(0, len(q), block_q)]
    blocks = [[t for t in range(start, min(start + block_k, len(k))) if t not in hidden]
              for start in range(0, len(k), block_k)]
    out = []
    for row in rows:
        score = [float(row @ k[tokens].mean(0)) if tokens else -math.inf for tokens in blocks]
        order = sorted(range(len(blocks)), key=lambda j: (-score[j], j))
        kind = [0] * len(blocks)
        for j in order[len(order) - n_drop:] if n_drop else []:
            kind[j] = -1
        for j in order[:n_keep]:
            kind[j] = 1 if blocks[j] else kind[j]
        for token in kept:
            j = token // block_k
            kind[j] = 1 if blocks[j] else kind[j]
        out.append(kind)
    return torch.tensor(out, dtype=torch.int8)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(1, 9),
       st.floats(0, 0.99), st.data())
def test_definition(lq, lk, block_q, block_k, keep, drop, data):
    kept = data.draw(st.lists(st.integers(0, lk - 1), max_size=3))
    hidden = data.draw(st.sets(st.integers(0, lk - 1)))
    generator = torch.Generator().manual_seed(lq * 61 + lk)
    q, k = torch.randn(1, 1, lq, 6, generator=generator), torch.randn(1, 1, lk, 6, generator=generator)
    blocks = -(-lk // block_k)
    keep_keys = torch.zeros(lk, dtype=torch.bool)
    keep_keys[kept] = True
    key_mask = torch.ones(1, lk, dtype=torch.bool)
    key_mask[0, list(hidden)] = False
    want = _by_hand(q[0, 0], k[0, 0], min(keep, blocks), math.floor(drop * blocks), block_q, block_k, kept, hidden)
    for backend in BACKENDS:
        got = route_blocks(q, k, keep=keep, drop=drop, block_q=block_q, block_k=block_k, keep_keys=keep_keys,
                           key_mask=key_mask, backend=backend)
        assert torch.equal(got[0, 0], want), backend


@pytest.mark.parametrize("keep, drop, critical, negligible", [
    (0.05, 0.0, 1, 0), (0.3, 0.3, 3, 3), (1.0, 0.0, 10, 0), (4, 0.5, 4, 5), (99, 0.5, 10, 0), (0.29, 0.71, 2, 7),
])
def test_counts(keep, drop, critical, negligible):
    q, k = torch.randn(2, 3, 100, 16), torch.randn(2, 3, 75, 16)
    for backend in BACKENDS:
        got = route_blocks(q, k, keep=keep, drop=drop, block_q=32, block_k=8, backend=backend)
        assert got.shape == (2, 3, 4, 10)
        assert ((got == 1).sum(-1) == critical).all() and ((got == -1).sum(-1) == negligible).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_rank_by_index(backend):
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 4, 8).repeat(1, 1, 10, 1)  # ten equal blocks
    got = route_blocks(q, k, keep=3, drop=0.4, block_q=8, block_k=4, backend=backend)
    assert torch.equal(got[0, 0, 0], torch.tensor([1] * 3 + [0] * 3 + [-1] * 4, dtype=torch.int8))
    assert (got == got[0, 0, 0]).all()


def test_half_inputs_are_scored_wider():
    """Two blocks whose bfloat16 scores tie (1.0) differ in float32."""
    q = torch.ones(1, 1, 4, 2, dtype=torch.bfloat16)
    k = torch.tensor([[1.0, 0.0], [1.0, 2 ** -12]], dtype=torch.bfloat16)[None, None].repeat_interleave(4, 2)
    assert torch.equal(route_blocks(q, k, keep=1, block_q=4, block_k=4)[0, 0, 0], torch.tensor([0, 1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [10 ** 12, 2 ** 63 - 1])
def test_blocks_longer_than_the_sequence_cost_nothing(block, backend):
    q, k = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 30, 8)
    assert torch.equal(route_blocks(q, k, block_q=block, block_k=block, backend=backend), torch.ones(1, 2, 1, 1))
    assert route_blocks(q, k, keep=1, block_q=block, block_k=7, backend=backend).shape == (1, 2, 1, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keep_keys(backend):
    q, k = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 70, 16)
    call = dict(keep=2, drop=0.5, block_q=16, block_k=8, backend=backend)
    plain = route_blocks(q, k, **call)
    mask = torch.zeros(70, dtype=torch.bool)
    mask[3], mask[69] = True, True
    want = plain.clone()
    want[..., 0], want[..., 8] = 1, 1  # on top of the two, wherever they were
    assert torch.equal(route_blocks(q, k, keep_keys=mask, **call), want)
    assert torch.equal(route_blocks(q, k, keep_keys=mask.expand(2, 70), **call), want)
    assert torch.equal(route_blocks(q, k, keep_keys=[(3, 4), (68, 70), (20, 20)], **call), want)
    assert torch.equal(route_blocks(q, k, keep_keys=[], **call), plain)
    per_sample = torch.stack([mask, torch.zeros_like(mask)])
    want[1] = plain[1]
    assert torch.equal(route_blocks(q, k, keep_keys=per_sample, **call), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys(backend):
    q, k = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[0, :16] = False  # two whole blocks of sample 0
    mask[1, 5:9] = False
    call = dict(keep=0.25, drop=0.25, block_q=16, block_k=8, key_mask=mask, backend=backend)
    got = route_blocks(q, k, **call)
    assert (got[0, ..., :2] == -1).all()  # nobody sees them: they rank last
    hidden = ~mask[:, None, :, None]
    assert torch.equal(route_blocks(q, k.masked_fill(hidden, math.nan), **call), got)
    everything = route_blocks(q, k, keep=1.0, block_q=16, block_k=8, keep_keys=[(0, 64)], key_mask=mask,
                              backend=backend)
    assert (everything[0, ..., :2] == 0).all() and (everything[0, ..., 2:] == 1).all() and (everything[1] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_blocks_among_the_kept_and_the_dropped(backend):
    """60 of 64 kept, 32 dropped, 10 hidden from everyone: these are dropped, the others critical."""
    q, k, mask = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 256, 16), torch.ones(1, 256, dtype=torch.bool)
    mask[:, :40] = False
    got = route_blocks(q, k, keep=60, drop=0.5, block_q=8, block_k=4, key_mask=mask, backend=backend)
    assert (got[..., :10] == -1).all() and (got[..., 10:] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_does_not_crash(poison, backend):
    q, k = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    q[0, 0, 3], k[0, :, 40:200:7] = poison, poison
    got = route_blocks(q, k, keep=0.3, drop=0.3, block_q=8, block_k=4, backend=backend)
    assert ((got == 1).sum(-1) == 22).all() and ((got == -1).sum(-1) == 22).all()


@pytest.mark.parametrize("layout", [strided, heads_last, poisoned])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    q, k = torch.randn(2, 3, 70, 24).to(dtype), torch.randn(2, 3, 50, 24).to(dtype)
    mask = torch.rand(2, 50) > 0.5
    keep = torch.rand(2, 50) > 0.9
    want = route_blocks(q, k, keep=0.3, block_q=16, block_k=8, key_mask=mask, keep_keys=keep)
    got = route_blocks(layout(q), layout(k), keep=0.3, block_q=16, block_k=8, key_mask=strided(mask),
                       keep_keys=strided(keep))
    assert torch.equal(got, want)


def test_no_gradient_and_opcheck():
    q, k = torch.randn(1, 2, 40, 8, requires_grad=True), torch.randn(1, 2, 40, 8)
    assert not route_blocks(q, k, block_q=8, block_k=8).requires_grad
    keep, mask = torch.zeros(1, 40, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool)
    for extra in ((None, None), (keep, mask)):
        torch.library.opcheck(sla_route, (q.detach(), k, 2, 1, 8, 8, *extra, "auto"))
    compiled = torch.compile(lambda q, k: route_blocks(q, k, keep=0.5, block_q=8, block_k=8, keep_keys=[(0, 3)]),
                             fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), route_blocks(q, k, keep=0.5, block_q=8, block_k=8, keep_keys=[(0, 3)]))


def test_same_map_whatever_the_threads():
    q, k, before = torch.randn(2, 3, 500, 32), torch.randn(2, 3, 500, 32), torch.get_num_threads()
    maps = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            maps.append(route_blocks(q, k, keep=0.2, drop=0.2, block_q=16, block_k=8))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
    assert triskele.explain("sla.route", q, k, 1, 0, 16, 8, None, None).chosen == "cpu"


BAD = [
    (dict(keep=0), "keep: expected an integer >= 1, got 0"),
    (dict(keep=0.0), r"keep: expected a share in \(0, 1\]"),
    (dict(keep=1.5), r"keep: expected a share in \(0, 1\]"),
    (dict(keep=math.nan), "keep: expected a share"),
    (dict(keep=True), "keep: expected a share or a number of blocks, got True"),
    (dict(keep="5%"), "keep: expected a share or a number"),
    (dict(drop=1.0), r"drop: expected a share in \[0, 1\)"),
    (dict(drop=-0.1), r"drop: expected a share in \[0, 1\)"),
    (dict(drop=False), "drop: expected a share"),
    (dict(keep=0.6, drop=0.5), r"keep \+ drop: expected at most 1"),
    (dict(block_q=0), "block_q: expected an integer >= 1"),
    (dict(block_k=1.0), "block_k: expected an integer >= 1"),
    (dict(k=torch.zeros(1, 1, 8, 5)), "k: expected shape"),
    (dict(k=torch.zeros(2, 1, 8, 4)), "k: expected shape"),
    (dict(k=torch.zeros(1, 1, 8, 4, dtype=torch.float64)), "k: expected the dtype of q"),
    (dict(q=torch.zeros(1, 1, 8, 0)), "head_dim D in 1..256"),
    (dict(q=torch.zeros(1, 8, 4)), "q: expected 4 dimensions"),
    (dict(q=torch.zeros(1, 1, 8, 4, dtype=torch.int64)), "q: expected a floating-point dtype"),
    (dict(keep_keys=torch.zeros(7, dtype=torch.bool)), "keep_keys: expected shape"),
    (dict(keep_keys=torch.zeros(2, 8, dtype=torch.bool)), "keep_keys: expected shape"),
    (dict(keep_keys=torch.zeros(8)), "keep_keys: expected dtype torch.bool"),
    (dict(keep_keys=[(0, 9)]), r"keep_keys: expected pairs \(start, stop\) within 0..8"),
    (dict(keep_keys=[3]), "keep_keys: expected pairs"),
    (dict(keep_keys=[(0.0, 3.0)]), "keep_keys: expected pairs"),
    (dict(keep_keys=[(None, 3)]), "keep_keys: expected pairs"),
    (dict(keep_keys=[(-3, -1)]), "keep_keys: expected pairs"),
    (dict(keep_keys="text"), "keep_keys: expected a bool tensor or a list"),
    (dict(key_mask=torch.ones(8, dtype=torch.bool)), "key_mask: expected shape"),
    (dict(key_mask=torch.ones(1, 8)), "key_mask: expected dtype torch.bool"),
    (dict(backend="gpu"), "backend: expected one of"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = dict(q=torch.zeros(1, 1, 8, 4), k=torch.zeros(1, 1, 8, 4), keep=0.5, block_q=4, block_k=4)
    route_blocks(**call)
    with pytest.raises(ValueError, match=message):
        route_blocks(**{**call, **change})
