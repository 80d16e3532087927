"""The emulator itself: what it computes against plain tensors, and that it finds the mistakes it is there for."""

from __future__ import annotations

import ctypes
import functools
import re

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason="; ".join(emulated.why_not()))


@functools.cache
def library(name):
    emulated.runtime()
    return ctypes.CDLL(str(emulated.build(emulated.EMULATE / f"{name}.cu", name)))


def call(name, *arguments, probe="probe_threads"):
    """What the probe says went wrong; empty where nothing did. Tensors travel as pointers."""
    function = getattr(library(probe), name)
    function.restype = ctypes.c_char_p
    return function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments)).decode()


@pytest.mark.parametrize("header", ["mma", "hopper"])
def test_a_shadow_has_every_name_of_its_header(header):
    real, shadow = ((root / "cuda" / "common" / f"{header}.cuh").read_text()
                    for root in (emulated.ROOT / "csrc", emulated.EMULATE))
    names = set(re.findall(r"^(?:\w[\w:<> ]*? \**)?(?:inline|__forceinline__)[\w:<> ]*? (\w+)\(", real, re.M))
    assert len(names) >= 15
    assert not {name for name in names if not re.search(rf"\b{name}\b", shadow)}


ORDERS = [("forward", 0), ("backward", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_tree_of_barriers(order):
    out = torch.zeros(3, 256, dtype=torch.int32)
    with emulated.order(*order):
        assert call("tree", out, 3, 1) == ""
    assert (out == 256 * 257 // 2).all()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_missing_barrier_shows(order):
    out = torch.zeros(2, 256, dtype=torch.int32)
    with emulated.order(*order):
        assert call("tree", out, 2, 0) == ""
    assert (out != 256 * 257 // 2).any()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_blocks_that_wait_for_each_other_show(order):
    out = torch.zeros(9, dtype=torch.int32)
    with emulated.order(*order):
        assert call("chain", out, 8) == ""
    assert torch.equal(out, torch.arange(9, dtype=torch.int32)) == (order[0] == "forward")


@pytest.mark.parametrize("lanes", [32, 13])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_warp_operations(lanes, order):
    out = torch.full((32, 6), -7, dtype=torch.int32)
    with emulated.order(*order):
        said = call("warp", out, lanes)
    if lanes != 32:
        assert "which is not there" in said
        return
    assert said == ""
    i = torch.arange(32, dtype=torch.int32)
    expected = torch.stack([10 * (i - 1).clamp(min=0), 10 * torch.where(i % 8 == 7, i, i + 1), 10 * (i ^ 3),
                            10 * (i // 8 * 8 + 5), torch.full_like(i, 0xaaaaaaaa - 2**32), torch.full_like(i, 496)], 1)
    assert torch.equal(out, expected.int())


@pytest.mark.parametrize("which, at, bytes_, message", [
    (0, 0, 0, "deadlock in block (0, 0, 0):"),
    (0, 0, 0, "threads 0-31: __syncthreads"),
    (1, 4096, 4096 * 4, "access at byte 16384 of 16384 bytes of dynamic shared memory"),
    (1, 257, 1024, "access at byte 1028 of 1024 bytes of dynamic shared memory"),
    (1, 251, 1000, "write at byte 1004 of 1000 bytes of dynamic shared memory"),
    (1, -1, 1024, "of 1024 bytes of dynamic shared memory"),
    (2, 1, 0, "misaligned"),
    (3, 64, 0, "index 64 out of bounds"),
    (4, 0, 0, "deadlock"),
    (6, 0, 0, "is not in its own mask"),
    (7, 0, 228 * 1024, "a block has at most"),
])
@pytest.mark.parametrize("order", ORDERS[:2], ids=str)
def test_mistakes_are_named(which, at, bytes_, message, order):
    with emulated.order(*order):
        assert message in call("wrong", which, at, bytes_, torch.zeros(64))


def test_shared_memory_starts_as_nan():
    out = torch.zeros(64)
    assert call("wrong", 5, 3, 1024, out) == "" and out.isnan().all()


def nibbles(values):
    """[rows, n] -> bytes, the first of two in the low half."""
    values = values.to(torch.uint8) & 15
    return (values[:, 0::2] | values[:, 1::2] << 4).contiguous()


@pytest.mark.parametrize("which, dtype", list(enumerate([torch.bfloat16, torch.float16, torch.int8, "s4", "u4"])))
@pytest.mark.parametrize("order", ORDERS[::2], ids=str)
def test_mma(which, dtype, order):
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
        stored = a, b
    elif dtype == torch.int8:
        a, b = (torch.randint(-128, 128, (n, 32)).to(torch.int8) for n in (16, 8))
        c, stored = torch.randint(-1000, 1000, (16, 8), dtype=torch.int32), (a, b)
    else:
        a = torch.randint(-8, 8, (16, 64)) if dtype == "s4" else torch.randint(0, 16, (16, 64))
        b, c = torch.randint(-8, 8, (8, 64)), torch.randint(-1000, 1000, (16, 8), dtype=torch.int32)
        stored = nibbles(a), nibbles(b)
    expected = c.double() + a.double() @ b.double().T
    with emulated.order(*order):
        assert call("product", which, *stored, c) == ""
    torch.testing.assert_close(c.double(), expected, atol=1e-5 if c.is_floating_point() else 0, rtol=1e-6)


def test_ldmatrix_transposes():
    tiles, out = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16), torch.zeros(4, 8, 8, dtype=torch.int16)
    assert call("transpose", tiles, out) == ""
    assert torch.equal(out, tiles.transpose(1, 2))


def test_copies_arrive_at_their_wait():
    source, out = torch.arange(1., 9.), torch.zeros(8)
    assert call("groups", source, out, 0) == "" and out.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert call("groups", source, out, 1) == "" and out[:4].tolist() == [1, 2, 3, 4] and out[4:].isnan().all()
