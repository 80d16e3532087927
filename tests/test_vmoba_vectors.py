"""VMoBA against the published code's outputs: tests/vectors/attention/vmoba_*; conventions in the README there."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from conftest import Vectors, vector_files
from tolerance import assert_relative

from triskele.ops import vmoba_attention, vmoba_partition, vmoba_select
from triskele.ops.vmoba import reference

POOLS = {"query_head": "query", "block": "block", "head_global": "head", "overall": "all"}
CASES = [f for f in vector_files("attention", "vmoba_t*")]
SPECIAL_TOPK = vector_files("attention", "vmoba_special_topk_*")
SPECIAL_THRESHOLD = vector_files("attention", "vmoba_special_threshold_*")
BACKENDS = ("reference", "cpu")


class Case:
    """One file: its packed sequences as samples of our layout."""

    def __init__(self, path):
        self.data = Vectors(path)
        meta = self.data.metadata
        inputs = Vectors(path.parent / meta["inputs_file"])
        # [S, H, D] -> [1, H, S, D]
        self.q, self.k, self.v, self.do = (inputs[n].transpose(0, 1)[None] for n in ("q", "k", "v", "do"))
        self.chunk = int(meta["moba_chunk_size"])
        self.mode, self.pool = meta["select_mode"], POOLS[meta["threshold_type"]]
        self.settings = {"chunk": self.chunk, "select": self.mode, "pool": self.pool}
        if self.mode == "topk":
            self.settings["top_k"] = int(meta["moba_topk"])
        else:
            self.settings["threshold"] = float(meta["simsum_threshold"])
        ends = self.data["cu_seqlens"].tolist()
        self.samples = list(pairwise(ends))
        self.own_pools = len(self.samples) == 1 or self.pool == "query"  # the published pools span packed samples

    def sequence(self, begin, end, dtype=torch.float32):
        return [x[:, :, begin:end].to(dtype) for x in (self.q, self.k, self.v, self.do)]

    def mask(self, name, index):
        """The stored [C, H, S] mask, of one sample: [1, C_b, H, S_b]."""
        begin, end = self.samples[index]
        return self.data[name][self.data["chunk_to_batch"] == index][..., begin:end][None]

    def check_stored(self, results, tolerance, gradient_tolerance):
        """results: o, dq, dk, dv [1, H, S, D] over all samples, against the stored rows and row means."""
        for name, value in zip(("o", "dq", "dk", "dv"), results):
            packed = value[0].transpose(0, 1).float()  # [S, H, D]
            allowed = tolerance if name == "o" else gradient_tolerance
            assert_relative(packed[self.data["rows"].long()], self.data[name], allowed, name)
            assert_relative(packed.mean(-1), self.data[f"rowmean_{name}"], allowed, f"rowmean_{name}")


def run(case, backend, dtype, selected):
    """o, dq, dk, dv of each sample, one behind the other; selected: by our own selection, or by the stored mask."""
    parts = []
    for index, (begin, end) in enumerate(case.samples):
        q, k, v, do = case.sequence(begin, end, dtype)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        how = case.settings if selected else {"chunk": case.chunk, "mask": case.mask("gate_mask_before", index)}
        o = vmoba_attention(q, k, v, **how, backend=backend)
        parts.append((o.detach(), *torch.autograd.grad(o, (q, k, v), do)))
    return [torch.cat(x, 2) for x in zip(*parts)]


@pytest.mark.parametrize("path", CASES + SPECIAL_TOPK + SPECIAL_THRESHOLD, ids=lambda p: p.stem[6:])
def test_gates_and_boundaries(path):
    case = Case(path)
    for index, (begin, end) in enumerate(case.samples):
        q, k, _, _ = case.sequence(begin, end)
        bounds = vmoba_partition((1, 1, end - begin), case.chunk / (end - begin)).bounds
        stored = case.data["cu_chunk"]
        assert torch.equal(bounds, stored[(stored >= begin) & (stored <= end)] - begin)
        gates = reference.gates(q, k, None, bounds)
        assert gates.dtype == torch.float32
        assert_relative(gates, case.mask("gate", index), 1e-6, "gate")
        own = reference.self_mask(None, bounds, end - begin)
        assert torch.equal(own, case.mask("self_chunk_mask", index)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", CASES + SPECIAL_TOPK, ids=lambda p: p.stem[6:])
def test_selection(path, backend):
    case = Case(path)
    if not case.own_pools:
        # The published pool spans the two samples; ours ends at each: only the own chunks are common to both.
        for index, (begin, end) in enumerate(case.samples):
            q, k, _, _ = case.sequence(begin, end)
            ours = vmoba_select(q, k, **case.settings, backend=backend)
            assert (ours & case.mask("self_chunk_mask", index)[:, :, None]).sum() == ours.shape[2] * ours.shape[3]
        return
    for index, (begin, end) in enumerate(case.samples):
        q, k, _, _ = case.sequence(begin, end)
        ours = vmoba_select(q, k, **case.settings, backend=backend)
        assert torch.equal(ours, case.mask("gate_mask_before", index))
        own = case.mask("self_chunk_mask", index)[:, :, None]
        assert torch.equal(ours & ~own, case.mask("gate_mask_after", index))
        halves = vmoba_select(q.bfloat16(), k.bfloat16(), **case.settings, backend=backend)
        assert torch.equal(halves, ours), "the inputs are bfloat16 numbers: so are the gates' products"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem[6:])
def test_outputs_and_gradients(path, backend):
    case = Case(path)
    assert case.data.metadata["full_attention_fallback"] == "False"
    case.check_stored(run(case, backend, torch.float32, selected=case.own_pools), 1e-5, 1e-5)
    case.check_stored(run(case, backend, torch.float32, selected=False), 1e-5, 1e-5)
    case.check_stored(run(case, backend, torch.bfloat16, selected=False), 2e-2, 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k_of_one_is_the_own_chunk_alone(backend):
    (path,) = SPECIAL_TOPK
    case = Case(path)
    ours = run(case, backend, torch.float32, selected=True)
    want = run(case, "reference", torch.float64, selected=False)
    own = case.mask("self_chunk_mask", 0)[:, :, None].expand_as(case.mask("gate_mask_before", 0))
    assert torch.equal(case.mask("gate_mask_before", 0), own)
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, want):
        assert_relative(a, b, 1e-5, name)
    # The stored output is full attention, the published code's fallback; ours under a mask of ones is that.
    q, k, v, do = case.sequence(0, 192)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    full = vmoba_attention(q, k, v, chunk=case.chunk, mask=torch.ones_like(own), backend=backend)
    case.check_stored((full, *torch.autograd.grad(full, (q, k, v), do)), 1e-5, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_that_is_never_reached_keeps_all(backend):
    (path,) = SPECIAL_THRESHOLD
    case = Case(path)
    q, k, _, _ = case.sequence(0, 192)
    assert vmoba_select(q, k, **case.settings, backend=backend).all()
    assert not case.data["gate_mask_before"].all(), "the published code stops at two other chunks"


def test_permutations():
    (path,) = vector_files("attention", "vmoba_permutation_*")
    data = Vectors(path)
    grid = tuple(json.loads(data.metadata["patch_resolution"]))
    chunks = json.loads(data.metadata["chunks"])
    assert {name.split("_")[1] for name in data} == set(chunks)
    for key, entry in chunks.items():
        size = entry["chunk_size"]
        partition = vmoba_partition(grid, tuple(size) if isinstance(size, list) else size)
        assert partition.order.dtype == partition.inverse.dtype == torch.int64
        assert partition.bounds.dtype == torch.int32
        assert torch.equal(partition.order, data[f"in_{key}"].long()), key
        assert torch.equal(partition.inverse, data[f"out_{key}"].long()), key
        lengths = partition.bounds.diff()
        assert (lengths[:-1] == entry["moba_chunk_size"]).all(), key
        assert 0 < lengths[-1] <= entry["moba_chunk_size"], key
