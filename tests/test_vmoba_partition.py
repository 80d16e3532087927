"""VMoBA's partitions of a token grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from vmoba_cases import draw

from triskele.ops import vmoba_attention, vmoba_partition
from triskele.ops.vmoba import VMoBAPartition
from triskele.ops.vmoba.partition import default_chunk


@pytest.mark.parametrize("grid, chunk", [
    ((3, 5, 7), 2), ((3, 5, 7), 0.3), ((3, 5, 7), (2, 3)), ((3, 5, 7), (2, 3, 4)), ((3, 5, 7), (9, 9, 9)),
    ((3, 5, 7), 9), ((1, 1, 1), 1), ((1, 6, 4), (4, 4)), ((5, 1, 3), [2, 1, 2]), ((4, 6, 8), (1, 2, 2))])
def test_partition_is_the_windows_in_raster_order(grid, chunk):
    partition = vmoba_partition(grid, chunk)
    tokens = torch.arange(math.prod(grid)).reshape(grid)
    if isinstance(chunk, (int, float)):
        want = list(tokens.flatten().split(int(chunk * grid[1] * grid[2])))
    else:
        sizes = (grid[0], *chunk) if len(chunk) == 2 else chunk
        starts = [range(0, n, size) for n, size in zip(grid, sizes)]
        want = [tokens[t:t + sizes[0], h:h + sizes[1], w:w + sizes[2]].flatten()
                for t, h, w in itertools.product(*starts)]
    got = partition.order.split(partition.bounds.diff().tolist())
    assert len(got) == len(want) == partition.num_chunks
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert torch.equal(partition.order[partition.inverse], torch.arange(partition.num_tokens))


def test_partition_sizes_read_in_decimal():
    assert vmoba_partition((1, 10, 10), 0.29).bounds[1] == 29  # 0.29 * 100 is 28.999... in floating point


@pytest.mark.parametrize("chunk", [3, 3.5, 10 ** 30, 1e300, (10 ** 30, 10 ** 30), pytest.param(10 ** 400, id="huge")])
def test_partition_of_more_than_there_is_spans_it(chunk):
    assert vmoba_partition((3, 4, 5), chunk).bounds.tolist() == [0, 60]


@pytest.mark.parametrize("grid, chunk, message", [
    ((4, 6), 1, "grid: expected"), ((4, 6, 0), 1, "grid w"), ((4, 6.0, 8), 1, "grid h"), (7, 1, "grid: expected"),
    ((1 << 11, 1 << 11, 1 << 11), 1, "grid: expected at most"),
    ((4, 6, 8), 0, "chunk"), ((4, 6, 8), -1, "chunk"), ((4, 6, 8), 0.001, "chunk: expected at least one token"),
    ((4, 6, 8), float("nan"), "chunk"), ((4, 6, 8), float("inf"), "chunk"), ((4, 6, 8), True, "chunk"),
    ((4, 6, 8), (0, 2), "chunk"), ((4, 6, 8), (2, 2.5), "chunk"), ((4, 6, 8), (1, 2, 3, 4), "chunk"),
    ((4, 6, 8), (2,), "chunk"), ((4, 6, 8), None, "chunk"), ((4, 6, 8), "2", "chunk")])
def test_partition_bad_input(grid, chunk, message):
    with pytest.raises(ValueError, match=message):
        vmoba_partition(grid, chunk)


@pytest.mark.parametrize("change, message", [
    ({"order": torch.arange(4).int()}, "order: expected dtype"),
    ({"bounds": torch.tensor([0, 4])}, "bounds: expected dtype"),
    ({"inverse": torch.arange(3)}, "inverse: expected shape"),
    ({"bounds": torch.tensor([0]).int()}, "bounds: expected at least"),
    ({"order": [0, 1, 2, 3]}, "order: expected a tensor"),
    ({"order": torch.zeros(2, 2).long()}, "order: expected 1 dim")])
def test_handmade_partition_is_checked(change, message):
    fields = {"order": torch.arange(4), "inverse": torch.arange(4), "bounds": torch.tensor([0, 4], dtype=torch.int32)}
    VMoBAPartition(**fields)
    with pytest.raises(ValueError, match=message):
        VMoBAPartition(**{**fields, **change})


@pytest.mark.parametrize("order, bounds", [
    ([0, 1, 2, 2], [0, 4]), ([0, 1, 2, 4], [0, 4]), ([-1, 1, 2, 3], [0, 4]), ([0, 1, 2, 3], [0, 3]),
    ([0, 1, 2, 3], [1, 4]), ([0, 1, 2, 3], [0, 2, 2, 4]), ([0, 1, 2, 3], [0, 5, 4])])
def test_the_kernel_refuses_a_partition_that_is_none(order, bounds):
    partition = VMoBAPartition(torch.tensor(order), torch.arange(4), torch.tensor(bounds, dtype=torch.int32))
    q, k, v = draw(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match=r"expected (order to be a permutation|bounds)"):
        vmoba_attention(q, k, v, chunk=partition, select="topk", pool="query", top_k=1, backend="cpu")


@pytest.mark.parametrize("grid", [(21, 30, 52), (7, 14, 14), (1, 32, 32), (3, 5, 7), (1, 1, 1), (1, 49, 1)])
def test_default_chunks_are_about_an_eighth(grid):
    tokens = math.prod(grid)
    for kind in range(3):
        count = vmoba_partition(grid, default_chunk(grid, kind)).num_chunks
        assert min(tokens, 4) <= count <= 16, (grid, kind)
    with pytest.raises(ValueError, match="kind"):
        default_chunk(grid, 3)
