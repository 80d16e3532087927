"""Every case of every op on every GPU backend of its table.

    accuracy  against the float64 reference, within the budget of tests/tolerance.py; outputs lie in poisoned memory
    layout    other strides and NaN around the inputs: the same bits
    bits      the same call again: the same bits
    graph     captured in a CUDA graph, replayed on other values: the same bits
    stream    on a side stream, behind the work that writes its inputs: the same bits
    opcheck   schema and fake kernel of the custom op
"""

from __future__ import annotations

import pytest
import torch
from generators import heads_last, poisoned, strided

from gpu import cases_adaln, cases_sla, cases_svdq, cases_taa, cases_vmoba
from gpu.family import (
    DEVICE,
    DRY,
    Case,
    Op,
    backends_of,
    exact_arguments,
    mapped,
    missing,
    overload,
    run,
    run_or_skip,
    takes_backend,
)

OPS = {op.name: op for file in (cases_sla, cases_vmoba, cases_svdq, cases_taa, cases_adaln) for op in file.OPS}
ASLEEP = 20_000_000  # GPU clocks: ten milliseconds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not DRY and not torch.cuda.is_available(), reason="needs a CUDA device: torch sees none")]
needs_streams = pytest.mark.skipif(DRY, reason="a rehearsal on the CPU has no streams")


def _of(thorough: bool, *, with_backend: bool = False, first: bool = False):
    """Parameters (op, backend, case) and their names, which tests/gpu/conftest.py reads."""
    found = []
    for op in OPS.values():
        chosen = [case for case in op.cases if (case.thorough or not thorough) and not (DRY and case.medium)]
        if with_backend and not takes_backend(op):
            continue
        for backend in backends_of(op.name):
            found += [pytest.param(op, backend, case, id=f"{op.name}/{backend}:{case.name}")
                      for case in (chosen[:1] if first else chosen)]
    return pytest.mark.parametrize("op, backend, case", found)


def arguments_of(case: Case, seed: int = 0) -> tuple:
    torch.manual_seed(seed)
    return mapped(case.make(seed), lambda t: t.to(DEVICE))


def same_bits(left: tuple, right: tuple) -> None:
    for position, (a, b) in enumerate(zip(left, right)):
        a, b = (t.contiguous().view(torch.uint8) if t.dim() else t for t in (a, b))
        assert torch.equal(a, b), f"output {position}: {int((a != b).sum())} bytes differ"


def poison_memory(like: tuple) -> None:
    """NaN in memory that the allocator will hand out next."""
    for tensor in [torch.empty_like(t) for t in like for _ in range(2)]:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            tensor.view(torch.uint8).fill_(0x7f if tensor.dtype != torch.bool else 1)


def margins(tensor: torch.Tensor) -> torch.Tensor:
    """NaN before and behind the values."""
    return poisoned(tensor.view(torch.uint8)).view(torch.bool) if tensor.dtype == torch.bool else poisoned(tensor)


@pytest.fixture(autouse=True)
def _backend_is_here(request):
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "backend" in values:
        reasons = missing(values["op"].name, values["backend"])
        if reasons and all(reason.startswith("needs compute capability") for reason in reasons):
            pytest.skip("refused: " + "; ".join(reasons))
        assert not reasons, f"{values['backend']} cannot run here: {'; '.join(reasons)}"


@_of(thorough=False)
def test_accuracy(op: Op, backend: str, case: Case):
    arguments = arguments_of(case)
    exact = run(op, exact_arguments(arguments), "reference")
    poison_memory(run_or_skip(op, arguments, backend))
    got = run(op, arguments, backend)
    assert [t.shape for t in got] == [t.shape for t in exact]
    op.compare(arguments, got, exact)


@_of(thorough=True)
def test_layout(op: Op, backend: str, case: Case):
    arguments = arguments_of(case)
    want = run_or_skip(op, arguments, backend)
    for layout in (strided, heads_last, margins):
        def relaid(value, layout=layout):
            return value if layout is heads_last and value.dim() != 4 else layout(value)

        moved = tuple(mapped(value, relaid) if position in op.relaid or layout is margins else value
                      for position, value in enumerate(arguments))
        same_bits(want, run(op, moved, backend))


@_of(thorough=True)
def test_bits(op: Op, backend: str, case: Case):
    arguments = arguments_of(case)
    want = run_or_skip(op, arguments, backend)
    for _ in range(4):
        poison_memory(want)
        same_bits(want, run(op, arguments, backend))


@needs_streams
@_of(thorough=True)
def test_graph(op: Op, backend: str, case: Case):
    static, other = arguments_of(case), arguments_of(case, seed=7)
    want = run_or_skip(op, static, backend), run(op, other, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture must not be the first call on its stream
        run(op, static, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(op, static, backend)
    for values, expected in zip((static, other), want):
        _fill(static, values)
        for tensor in out:
            tensor.view(torch.uint8).fill_(0x7f) if tensor.dim() and tensor.is_contiguous() else None
        graph.replay()
        torch.cuda.synchronize()
        same_bits(expected, out)


@needs_streams
@_of(thorough=True)
def test_stream(op: Op, backend: str, case: Case):
    real, stale = arguments_of(case), arguments_of(case, seed=7)
    want = run_or_skip(op, real, backend)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(ASLEEP)
        _fill(stale, real)
        got = run(op, stale, backend)
    side.synchronize()
    same_bits(want, got)


def _fill(into: tuple, values: tuple) -> None:
    for to, value in zip(into, values):
        if isinstance(to, torch.Tensor):
            to.copy_(value)
        elif isinstance(to, (list, tuple)):
            _fill(to, value)


@_of(thorough=True, with_backend=True, first=True)
def test_opcheck(op: Op, backend: str, case: Case):
    arguments = arguments_of(case)
    run_or_skip(op, arguments, backend)
    torch.library.opcheck(overload(op), (*arguments, backend), test_utils=("test_schema", "test_faketensor"))

