"""Emulated clusters: blocks that run at the same time, loads into several of them, arrivals from one at another."""

from __future__ import annotations

import emulated
import pytest
import torch
from test_emulate import ORDERS, call

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason="; ".join(emulated.why_not()))


def ring(size, blocks, wrong=0, tiles=7):
    """What the probe said, the tiles and each block's sums of them."""
    data, out = torch.randn(tiles, 128), torch.zeros(blocks, tiles)
    return call("clusters", data, tiles, size, blocks, wrong, out, probe="probe_clusters"), data, out


@pytest.mark.parametrize("size, blocks", [(2, 2), (2, 6), (4, 8)])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_ring_that_all_blocks_of_a_cluster_fill(order, size, blocks):
    with emulated.order(*order):
        said, data, out = ring(size, blocks)
    assert said == ""
    torch.testing.assert_close(out, data.sum(1).expand(blocks, -1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("wrong, message", [
    (1, "was not initialised"), (3, "has exited"), (4, "block 2 of a cluster of 2"), (5, "bytes to come")])
def test_mistakes(wrong, message):
    assert any(message in said for said in answers(wrong)), answers(wrong)


def answers(wrong):
    found = []
    for order in ORDERS:
        with emulated.order(*order):
            found.append(ring(2, 2, wrong)[0])
    return found


def test_a_buffer_that_only_one_block_has_released():
    shown = 0
    for seed in range(6):
        with emulated.order("random", seed):
            said, data, out = ring(2, 2, 2)
        shown += said != "" or not torch.allclose(out, data.sum(1).expand(2, -1), atol=1e-4)
    assert shown == 6


def test_clusters_that_no_launch_may_have():
    assert "clusters of 2 blocks of 64 threads in a grid of 3" in ring(2, 3)[0]


def test_a_deadlock_tells_of_every_block():
    said = next(said for said in answers(5) if "deadlock" in said)
    assert "block (0, 0, 0)" in said and "block (1, 0, 0)" in said and "the cluster's barrier" in said
