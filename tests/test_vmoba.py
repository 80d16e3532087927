"""VMoBA's attention: the kernels' error budgets, hostile and bad inputs, the custom ops, the module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from generators import heads_last, poisoned, strided, with_outliers
from tolerance import assert_relative, assert_within_budget
from vmoba_cases import BACKENDS, MODES, dense, draw, with_gradients

import triskele
from triskele import backend as backends
from triskele.configs import VMoBA
from triskele.nn import VMoBAAttention
from triskele.ops import vmoba_attention, vmoba_partition, vmoba_select
from triskele.ops.vmoba import reference
from triskele.ops.vmoba.partition import default_chunk

SHAPES = {  # [B, H, S, D], chunk
    "ragged": ((2, 2, 131, 17), 40),
    "partition": ((1, 3, 420, 72), vmoba_partition((5, 7, 12), (2, 3, 5))),
    "small chunks": ((1, 2, 192, 64), vmoba_partition((4, 6, 8), (1, 2, 2))),
    "long chunks": ((1, 1, 900, 128), 300),
    "widest head": ((1, 1, 150, 256), 32),
    "one token": ((2, 1, 1, 1), 5),
    "one chunk": ((1, 2, 65, 33), 400),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, outliers, dtype):
    sizes, chunk = SHAPES[shape]
    q, k, v, do = draw(*sizes, count=4, dtype=dtype)
    if outliers:
        q, v, do = with_outliers(q, 10.0, 0.02), with_outliers(v), with_outliers(do)
    mask = vmoba_select(q, k, chunk=chunk, select="threshold", pool="head", threshold=0.4)
    truth = with_gradients(lambda *x: dense(*x, mask, chunk), (q.double(), k.double(), v.double()), do)
    same = with_gradients(lambda *x: dense(*x, mask, chunk), (q, k, v), do)
    kernel = with_gradients(lambda *x: vmoba_attention(*x, chunk=chunk, mask=mask, backend="cpu"), (q, k, v), do)
    plain = with_gradients(lambda *x: vmoba_attention(*x, chunk=chunk, mask=mask, backend="reference"), (q, k, v), do)
    exact = with_gradients(lambda *x: vmoba_attention(*x, chunk=chunk, mask=mask, backend="reference"),
                           (q.double(), k.double(), v.double()), do)
    for name, a, p, e, s, t in zip(("o", "dq", "dk", "dv"), kernel, plain, exact, same, truth):
        assert a.dtype == p.dtype == dtype and a.is_contiguous()
        # The backward computes P = exp(S - lse) anew, from a rounded lse; autograd, which is "same", kept its P.
        assert_within_budget(a, t, s, factor=2.0 if name == "o" else 4.0, what=f"cpu {name}")
        assert_within_budget(p, t, t.to(dtype), what=f"reference {name}")
        assert_relative(e, t, 1e-12, f"reference in float64 {name}")


def test_reference_gradients_by_finite_differences():
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 11, 3, dtype=torch.float64))
    mask = torch.rand(1, 3, 2, 11) < 0.5
    assert torch.autograd.gradcheck(lambda *x: vmoba_attention(*x, chunk=4, mask=mask, backend="reference"), (q, k, v))


def test_reference_by_blocks_of_rows(monkeypatch):
    q, k, v, do = draw(2, 2, 50, 8, count=4)
    how = {"chunk": 12, "select": "topk", "pool": "query", "top_k": 2, "backend": "reference"}
    whole = with_gradients(lambda *x: vmoba_attention(*x, **how), (q, k, v), do)
    monkeypatch.setattr(reference, "_SCORES_AT_ONCE", 7 * 4 * 50)
    blocks = with_gradients(lambda *x: vmoba_attention(*x, **how), (q, k, v), do)
    for a, b in zip(whole, blocks):
        assert_relative(a, b, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_natural_and_float32(backend):
    q, k, v = draw(1, 2, 70, 16, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 30, 70], dtype=torch.int32)
    everything = torch.ones(1, 2, 2, 70, dtype=torch.bool)
    _, lse = torch.ops.triskele.vmoba_attention(q, k, v, None, bounds, everything, backend)
    assert lse.dtype == torch.float32
    assert_relative(lse, (q.double() @ k.double().mT / 4).logsumexp(-1), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_own_chunk_stays_where_the_mask_leaves_it_out(backend):
    q, k, v, do = draw(1, 2, 60, 8, count=4)
    nothing, own = torch.zeros(1, 4, 2, 60, dtype=torch.bool), vmoba_select(q, k, chunk=16, top_k=1)
    runs = [with_gradients(lambda *x: vmoba_attention(*x, chunk=16, mask=mask, backend=backend), (q, k, v), do)  # noqa: B023
            for mask in (nothing, own)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_margins_change_no_bit(dtype):
    q, k, v, do = draw(2, 2, 210, 40, count=4, dtype=dtype)
    chunk = vmoba_partition((5, 6, 7), (2, 4, 3))
    mask = vmoba_select(q, k, chunk=chunk, select="topk", pool="head", top_k=2)
    plain = with_gradients(lambda *x: vmoba_attention(*x, chunk=chunk, mask=mask), (q, k, v), do)
    for layout in (strided, heads_last, poisoned):
        tensors = [layout(x) for x in (q, k, v)]
        how = (chunk.order, chunk.bounds, mask if layout is poisoned else layout(mask), "cpu")
        out, lse = torch.ops.triskele.vmoba_attention(*tensors, *how)
        lse = lse.mT.contiguous().mT if layout is heads_last else layout(lse)
        grads = torch.ops.triskele.vmoba_attention_backward(layout(do), *tensors, layout(out), lse, *how)
        for a, b in zip((out, *grads), plain):
            assert torch.equal(a, b), layout.__name__
        assert torch.equal(vmoba_select(*tensors[:2], chunk=chunk, select="topk", pool="head", top_k=2), mask)


def test_chunks_that_nobody_selects_are_not_read():
    q, k, v, do = draw(1, 2, 100, 16, count=4)
    mask = torch.ones(1, 4, 2, 100, dtype=torch.bool)
    mask[:, 2] = False
    seen = torch.arange(100) // 28 != 2
    clean = with_gradients(lambda *x: vmoba_attention(*x, chunk=28, mask=mask, backend="cpu"), (q, k, v), do)
    k[:, :, ~seen], v[:, :, ~seen] = float("nan"), float("nan")
    dirty = with_gradients(lambda *x: vmoba_attention(*x, chunk=28, mask=mask, backend="cpu"), (q, k, v), do)
    assert torch.equal(clean[0][:, :, seen], dirty[0][:, :, seen])
    assert torch.equal(clean[1][:, :, seen], dirty[1][:, :, seen])
    assert dirty[0][:, :, ~seen].isnan().all()


def test_same_bits_whatever_the_number_of_threads():
    q, k, v, do = draw(2, 3, 900, 48, count=4)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            masks = [vmoba_select(q, k, chunk=100, select=s, pool=p, top_k=3, threshold=0.4) for s, p in MODES]
            runs.append(masks + with_gradients(
                lambda *x: vmoba_attention(*x, chunk=vmoba_partition((9, 10, 10), (4, 5, 5)), top_k=3), (q, k, v), do))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 40, 8), (2, 0, 40, 8), (2, 2, 0, 8)])
def test_empty(shape, backend):
    q, k, v, do = draw(*shape, count=4)
    for select, pool in MODES:
        setting = {"chunk": 16, "select": select, "pool": pool, "top_k": 2, "threshold": 0.5, "backend": backend}
        assert vmoba_select(q, k, **setting).shape == (shape[0], -(-shape[2] // 16), *shape[1:3])
        for result in with_gradients(lambda *x: vmoba_attention(*x, **setting), (q, k, v), do):  # noqa: B023
            assert result.shape == shape


# ---- bad inputs


Q = torch.zeros(2, 3, 24, 8)
GOOD = {"q": Q, "k": Q, "v": Q, "chunk": 8, "select": "topk", "pool": "query", "top_k": 2, "threshold": 0.5}


@pytest.mark.parametrize("change, message", [
    ({"q": Q[0]}, "q: expected 4 dimensions"), ({"q": None}, "q: expected a tensor"),
    ({"q": Q.int()}, "q: expected a floating"), ({"k": Q[:, :, :20]}, "k: expected shape"),
    ({"k": Q[:, :1]}, "k: expected shape"), ({"k": Q[..., :4]}, "k: expected shape"),
    ({"v": Q[:1]}, "v: expected shape"), ({"v": Q.double()}, "v: expected the dtype of q"),
    ({"k": Q.to("meta")}, "k: expected the device of q"),
    (dict.fromkeys("qkv", Q[..., :0]), "head_dim: expected"),
    (dict.fromkeys("qkv", torch.zeros(1, 1, 4, 257)), "head_dim: expected"), ({"chunk": 0}, "chunk: expected"),
    ({"chunk": -3}, "chunk: expected"), ({"chunk": 2.5}, "chunk: expected a chunk length"),
    ({"chunk": True}, "chunk: expected a chunk length"), ({"chunk": (2, 2)}, "chunk: expected a chunk length"),
    ({"chunk": vmoba_partition((2, 3, 5), 1)}, "chunk: expected a partition of S = 24"),
    ({"chunk": vmoba_partition((2, 3, 4), 1).to("meta")}, "chunk: expected the device of q"),
    ({"select": "best"}, "select: expected"), ({"pool": "row"}, "pool with select='topk': expected"),
    ({"pool": "block"}, "pool with select='topk': expected"),
    *[({"top_k": x}, "top_k: expected") for x in (0, -1, None, 1.5)],
    *[({"select": "threshold", "threshold": x}, "threshold: expected")
      for x in (0, -0.1, 1.01, float("nan"), None, "0.5", True)],
    ({"backend": "gpu"}, "backend: expected"),
])
def test_bad_input(change, message):
    arguments = {**GOOD, **change}
    with pytest.raises(ValueError, match=message):
        vmoba_attention(**arguments)
    if "v" not in change:
        arguments.pop("v")
        with pytest.raises(ValueError, match=message):
            vmoba_select(**arguments)


@pytest.mark.parametrize("mask, message", [
    (torch.ones(2, 3, 3, 24), "mask: expected dtype torch.bool"),
    (torch.ones(2, 4, 3, 24, dtype=torch.bool), "mask: expected shape"),
    (torch.ones(2, 3, 24, dtype=torch.bool), "mask: expected 4 dim"), ([True], "mask: expected a tensor"),
    (torch.ones(2, 3, 3, 24, dtype=torch.bool, device="meta"), "mask: expected the device")])
def test_bad_mask(mask, message):
    with pytest.raises(ValueError, match=message):
        vmoba_attention(Q, Q, Q, chunk=8, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_that_the_kernel_refuses(dtype):
    q = Q.to(dtype)
    with pytest.raises(NotImplementedError, match=f"cpu: takes float32 and bfloat16, got {str(dtype)[6:]}"):
        vmoba_attention(q, q, q, chunk=8, top_k=2)
    assert vmoba_attention(q, q, q, chunk=8, top_k=2, backend="reference").dtype == dtype


def test_tables():
    rows = {(r.op, r.backend): r.runs_here for r in triskele.backends() if r.op.startswith("vmoba")}
    assert all(rows[f"vmoba.{op}", b] for op in ("select", "attention", "attention_backward") for b in BACKENDS)
    mask = torch.ones(2, 3, 3, 24, dtype=torch.bool)
    choice = backends.explain("vmoba.attention", Q, Q, Q, None, torch.tensor([0, 8, 16, 24]).int(), mask)
    assert choice.chosen == "cpu" and choice.reasons["reference"] == ["cpu comes first"]


# ---- custom ops


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    ops, partition = torch.ops.triskele, vmoba_partition((2, 3, 5), (1, 2, 3))
    q, k, v, do = draw(1, 2, 30, 8, count=4)
    for order, bounds in ((None, torch.tensor([0, 16, 30]).int()), (partition.order, partition.bounds)):
        torch.library.opcheck(ops.vmoba_select.default, (q, k, order, bounds, "threshold", "head", 1, 0.5, backend))
        mask = torch.rand(1, len(bounds) - 1, 2, 30) < 0.5
        leaves = [heads_last(x).requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(ops.vmoba_attention.default, (*leaves, order, bounds, mask, backend))
        out, lse = ops.vmoba_attention(q, k, v, order, bounds, mask, backend)
        saved = (do, q, k, v, out, lse, order, bounds, mask, backend)
        torch.library.opcheck(ops.vmoba_attention_backward.default, saved)


@pytest.mark.parametrize("compiler, dynamic", [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
def test_compiles_whole(compiler, dynamic):
    torch._dynamo.reset()
    partition = vmoba_partition((3, 4, 5), (2, 2, 2))

    def model(q, k, v):
        return (vmoba_attention(q * 2, k, v, chunk=partition, select="threshold", pool="all", threshold=0.4)
                + vmoba_attention(q, k, v, chunk=16, top_k=2))

    q, k, v, do = draw(2, 2, 60, 16, count=4)
    compiled = torch.compile(model, fullgraph=True, backend=compiler, dynamic=dynamic)
    for a, b in zip(with_gradients(compiled, (q, k, v), do), with_gradients(model, (q, k, v), do)):
        assert_relative(a, b, 1e-6)


# ---- the module


@pytest.mark.parametrize("config", [
    VMoBA(), VMoBA(chunks=(1, (3, 4), (2, 3, 4)), top_k=(1, 2, 3)),
    VMoBA(select="threshold", pool="block", threshold=0.3)])
def test_module_takes_its_layers_partition(config):
    grid = (4, 6, 8)
    q, k, v = draw(1, 2, 192, 16)
    for layer in range(6):
        module = VMoBAAttention(config, layer)
        assert not list(module.parameters()) and not module.state_dict()
        chunk = config.chunks[layer % 3] if config.chunks else default_chunk(grid, layer % 3)
        top_k = config.top_k[layer % 3] if isinstance(config.top_k, tuple) else config.top_k
        want = vmoba_attention(q, k, v, chunk=vmoba_partition(grid, chunk), select=config.select, pool=config.pool,
                               top_k=top_k, threshold=config.threshold)
        assert torch.equal(module(q, k, v, grid), want)
        assert module.partition(grid) is module.partition(grid)
        assert torch.equal(module(q, k, v, grid, dense=True), F.scaled_dot_product_attention(q, k, v))
    assert "spatio-temporal" in repr(module)


def test_module_dense_layers_other_grids_and_compile():
    torch._dynamo.reset()
    q, k, v = draw(1, 1, 36, 8)
    dense_layer = VMoBAAttention(VMoBA(dense_layers=2), 1)
    assert torch.equal(dense_layer(q, k, v, (1, 6, 6)), F.scaled_dot_product_attention(q, k, v))
    module = VMoBAAttention(VMoBA(top_k=2, dense_layers=2), 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for grid in ((1, 6, 6), (4, 3, 3)):
        assert torch.equal(compiled(q, k, v, grid), VMoBAAttention(VMoBA(top_k=2), 2)(q, k, v, grid))


def test_module_bad_input():
    with pytest.raises(ValueError, match="layer_index"):
        VMoBAAttention(VMoBA(), -1)
    with pytest.raises(ValueError, match="chunk: expected a partition of S = 24"):
        VMoBAAttention(VMoBA(), 0)(Q, Q, Q, (2, 3, 5))
