"""VMoBA's selection: by brute force from the definition, ties, dtypes, layouts, NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from generators import heads_last, strided, with_outliers
from vmoba_cases import BACKENDS, MODES, chunk_of, draw

from triskele.ops import vmoba_attention, vmoba_partition, vmoba_select


def brute_force(q, k, chunk, select, pool, top_k=1, threshold=1.0):
    """The definition, entry by entry, on Python numbers."""
    batch, heads, length, _ = q.shape
    where = chunk_of(chunk, length)
    chunks = int(where.max()) + 1
    mean = torch.stack([k[:, :, where == c].double().mean(2) for c in range(chunks)], 1)  # [B, C, H, D]
    gate = torch.einsum("bchd,bhsd->bchs", mean, q.double()).float()
    mask = torch.zeros(gate.shape, dtype=torch.bool)
    for b in range(batch):
        pools = {}
        for c, h, s in itertools.product(range(chunks), range(heads), range(length)):
            key = {"query": (h, s), "block": c, "head": h, "all": None}[pool]
            pools.setdefault(key, []).append((float(gate[b, c, h, s]), c, h, s))
        for entries in pools.values():
            own = [e for e in entries if where[e[3]] == e[1]]
            others = sorted((e for e in entries if where[e[3]] != e[1]), key=lambda e: (-e[0], e[1:]))
            if select == "topk":
                kept = (top_k - 1) * {"query": 1, "head": length, "all": heads * length}[pool]
            else:
                low, high = min(e[0] for e in entries), max(e[0] for e in entries)
                spread = high - low if high - low > 1e-6 else 1.0
                total = math.fsum((e[0] - low) / spread for e in entries) + 1e-6
                rest = max(0.0, threshold - math.fsum((e[0] - low) / spread for e in own) / total)
                kept, mass = len(others), 0.0
                for i, e in enumerate(others):
                    mass += (e[0] - low) / spread
                    if mass / total >= rest:
                        kept = i + 1
                        break
            for _, c, h, s in own + others[:kept]:
                mask[b, c, h, s] = True
    return mask


CHUNKS = {"length": 13, "partition": vmoba_partition((3, 4, 4), (2, 2, 3))}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("select, pool", MODES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_selection_is_the_definition(chunk, select, pool, backend):
    q, k = draw(2, 2, 48, 5, count=2)
    for top_k, threshold in ((1, 0.05), (2, 0.3), (3, 0.7), (99, 1.0)):
        setting = {"top_k": top_k} if select == "topk" else {"threshold": threshold}
        want = brute_force(q, k, CHUNKS[chunk], select, pool, **setting)
        got = vmoba_select(q, k, chunk=CHUNKS[chunk], select=select, pool=pool, **setting, backend=backend)
        assert torch.equal(got, want), setting
    assert got.all(), "more chunks than there are, or a threshold of 1: everything"


@pytest.mark.parametrize("places", [15, 16, 17, 30])
def test_many_places_a_query(places):
    """The kernel ranks few places in registers and more of them another way."""
    q, k = draw(1, 2, 70, 3, count=2)
    got = vmoba_select(q, k, chunk=2, top_k=1 + places, backend="cpu")
    assert torch.equal(got, brute_force(q, k, 2, "topk", "query", top_k=1 + places))
    assert (got.sum(1) == 1 + places).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("select, pool", MODES)
def test_ties_rank_by_chunk_head_token(select, pool, backend):
    """Gates in {-1, 0, 1}, then all equal, which also makes the spread zero."""
    q = torch.randint(-1, 2, (1, 2, 40, 1)).float()
    k = torch.randint(0, 2, (1, 2, 5, 1)).float().repeat_interleave(8, 2)
    for queries, keys in ((q, k), (-q, k * 0), (q * 0 + 1, k * 0 + 2)):
        setting = {"top_k": 3} if select == "topk" else {"threshold": 0.6}
        got = vmoba_select(queries, keys, chunk=8, select=select, pool=pool, **setting, backend=backend)
        assert torch.equal(got, brute_force(queries, keys, 8, select, pool, **setting))


@pytest.mark.parametrize("select, pool", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kernel_selects_as_the_reference(select, pool, dtype):
    q, k = draw(2, 3, 700, 24, count=2, dtype=dtype)
    q, k = heads_last(with_outliers(q, 30.0)), strided(k)
    for setting in ({"top_k": 2, "threshold": 0.2}, {"top_k": 4, "threshold": 0.8}):
        chunk = vmoba_partition((7, 10, 10), (3, 4, 6))
        both = [vmoba_select(q, k, chunk=chunk, select=select, pool=pool, **setting, backend=b) for b in BACKENDS]
        assert torch.equal(*both)
    assert 0.05 < both[0].float().mean() < 1


@pytest.mark.parametrize("pool", ["query", "block", "head", "all"])
def test_a_sample_does_not_depend_on_its_neighbours(pool):
    q, k, v = draw(3, 2, 90, 16)
    k[1] *= 100
    setting = {"chunk": 20, "select": "threshold", "pool": pool, "threshold": 0.4}
    together = vmoba_select(q, k, **setting), vmoba_attention(q, k, v, **setting)
    for b in range(3):
        alone = q[b:b + 1], k[b:b + 1]
        assert torch.equal(vmoba_select(*alone, **setting), together[0][b:b + 1])
        assert torch.equal(vmoba_attention(*alone, v[b:b + 1], **setting), together[1][b:b + 1])


@pytest.mark.parametrize("select, pool", MODES)
def test_nan_gates_end_in_a_mask(select, pool):
    q, k = draw(1, 2, 60, 8, count=2)
    q[0, 0, 7, 3], k[0, 1, 33, 2] = float("nan"), float("inf")
    both = [vmoba_select(q, k, chunk=16, select=select, pool=pool, top_k=2, threshold=0.3, backend=b) for b in BACKENDS]
    assert (both[0].sum(1) >= 1).all() and (both[1].sum(1) >= 1).all()
    if select == "topk":
        assert torch.equal(*both)
