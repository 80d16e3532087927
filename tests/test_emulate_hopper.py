"""The emulated mbarriers, TMA and wgmma against plain tensors. Images of shared memory are made here from the PTX ISA's
swizzle alone: the 16-byte piece p of the 128-byte row i lies at 128 i + 16 (p xor i mod 8)."""

from __future__ import annotations

import re
import subprocess

import emulated
import pytest
import torch
from test_emulate import ORDERS, call

pytestmark = pytest.mark.skipif(bool(emulated.why_not()), reason="; ".join(emulated.why_not()))

HALVES = {0: torch.bfloat16, 1: torch.float16, 2: torch.int8}
K_MAJOR, MN_MAJOR, REGISTERS = 0, 1, 2


def swizzled(rows):
    """uint8 [n, 128 c] -> c tiles [n, 128], swizzled, one after the other."""
    n = rows.shape[0]
    pieces = rows.reshape(n, -1, 8, 16).permute(1, 0, 2, 3)              # [c, n, piece, 16]
    i = torch.arange(n)[:, None]
    place = torch.arange(8)[None] ^ i % 8                                # where piece p of row i goes
    return torch.empty_like(pieces).contiguous().scatter_(
        2, place[None, :, :, None].expand(pieces.shape), pieces).flatten()


def image(matrix, major):
    """[M or N, K] -> (bytes, chunk): rows along K, or columns along M or N, in whole chunks of 64."""
    if major == MN_MAJOR:
        matrix = torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % 64))
    rows = (matrix if major == K_MAJOR else matrix.T).contiguous()
    return swizzled(rows.view(torch.uint8)), rows.shape[0] * 128


def product(type_, columns, a, b, depth=128, wrong=0, magnitude=None):
    """The probe's answer, its d and the exact one."""
    dtype = HALVES[type_]
    if dtype == torch.int8:
        left, right = (torch.randint(-128, 128, (n, depth)).to(dtype) for n in (64, columns))
        d = torch.randint(-1000, 1000, (64, columns), dtype=torch.int32)
    else:
        left, right = (torch.randn(n, depth).to(dtype) for n in (64, columns))
        d = torch.randn(64, columns)
    expected = d.double() + left.double() @ right.double().T
    a_bytes, a_chunk = (left.view(torch.uint8), 0) if a == REGISTERS else image(left, a)
    b_bytes, b_chunk = image(right, b)
    sizes = torch.tensor([a_bytes.numel() if a != REGISTERS else 0, b_bytes.numel(),
                          depth * left.element_size() // 32, a_chunk, b_chunk], dtype=torch.int32)
    said = call("product", type_, columns, a, b, a_bytes, b_bytes, d, sizes, wrong, probe="probe_hopper")
    return said, d.double(), expected


@pytest.mark.parametrize("columns", [64, 96, 128, 256])
@pytest.mark.parametrize("type_, a, b", [(0, K_MAJOR, K_MAJOR), (0, REGISTERS, MN_MAJOR), (1, MN_MAJOR, MN_MAJOR),
                                         (1, REGISTERS, K_MAJOR), (0, K_MAJOR, MN_MAJOR), (0, MN_MAJOR, K_MAJOR),
                                         (2, K_MAJOR, K_MAJOR), (2, REGISTERS, K_MAJOR)])
def test_wgmma(type_, a, b, columns):
    said, d, expected = product(type_, columns, a, b)
    assert said == ""
    torch.testing.assert_close(d, expected, atol=0 if type_ == 2 else 1e-4, rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS[1:], ids=str)
def test_wgmma_in_any_order(order):
    with emulated.order(*order):
        said, d, expected = product(0, 128, K_MAJOR, MN_MAJOR, depth=64)
    assert said == ""
    torch.testing.assert_close(d, expected, atol=1e-4, rtol=1e-6)


def test_accumulators_are_nan_until_the_wait():
    said, d, _ = product(0, 64, K_MAJOR, K_MAJOR, depth=64, wrong=1)
    assert said == "" and d.isnan().all()


@pytest.mark.parametrize("wrong, message", [
    (2, "no wgmma_fence since its registers were touched"),
    (3, "was written without fence_proxy_async after it"),
    (4, "B in shared memory changed between its issue and its wait"),
    (5, "have not executed the same products"),
])
def test_mistakes_with_wgmma(wrong, message):
    assert message in product(0, 64, K_MAJOR, K_MAJOR, depth=64, wrong=wrong)[0]


TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.uint8: 2, torch.float32: 3}


def load(tensor, corner, box, *, swizzle=False, wrong=0):
    """What a TMA load of the box leaves: bytes [rows, box[0] in bytes]. Dimension 0 is the tensor's last."""
    sizes, strides = tensor.shape[::-1], [s * tensor.element_size() for s in tensor.stride()[::-1]]
    pad = [0] * (4 - tensor.dim())
    geometry = torch.tensor([tensor.dim(), *sizes, *pad, *strides, *pad, *box, *pad])
    bytes_ = torch.tensor(box).prod().item() * tensor.element_size()
    out = torch.zeros(bytes_, dtype=torch.uint8)
    corner = torch.tensor([*corner, *pad], dtype=torch.int32)
    said = call("tma", tensor, TYPES[tensor.dtype], geometry, int(swizzle), corner, bytes_, wrong, out,
                probe="probe_hopper")
    return said, out.reshape(-1, box[0] * tensor.element_size())


def boxed(tensor, corner, box):
    """The same by indexing, zeros outside."""
    out = torch.zeros(box[::-1], dtype=tensor.dtype)
    inside = [slice(max(0, -c), max(0, min(b, n - c))) for c, b, n in zip(corner, box, tensor.shape[::-1])][::-1]
    source = [slice(max(0, c), max(0, min(n, c + b))) for c, b, n in zip(corner, box, tensor.shape[::-1])][::-1]
    out[tuple(inside)] = tensor[tuple(source)]
    return out.reshape(-1, box[0]).contiguous().view(torch.uint8)


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize("dtype, shape, corner, box", [
    (torch.bfloat16, (40, 128), (64, 8), (64, 16)),
    (torch.bfloat16, (40, 72), (64, 30), (64, 16)),          # past the end on both sides
    (torch.float16, (3, 20, 64), (0, -5, 1), (64, 8, 2)),    # before the start
    (torch.uint8, (2, 3, 10, 128), (0, 8, 2, 1), (128, 4, 1, 1)),
    (torch.float32, (9, 32), (0, 9), (32, 4)),               # wholly outside
])
@pytest.mark.parametrize("order", ORDERS[::2], ids=str)
def test_tma_boxes(dtype, shape, corner, box, swizzle, order):
    tensor = torch.randint(0, 256, shape).to(dtype)
    with emulated.order(*order):
        said, got = load(tensor, corner, box, swizzle=swizzle)
    assert said == ""
    expected = boxed(tensor, corner, box)
    assert torch.equal(got.flatten(), swizzled(expected) if swizzle else expected.flatten())


@pytest.mark.parametrize("wrong, message", [
    (1, "16 bytes to come"), (2, "bytes to come"), (3, "no fence_barrier_init has made known"),
    (5, "bytes expected that did not come"),
])
def test_mistakes_with_tma(wrong, message):
    assert message in load(torch.randn(40, 64).half(), (0, 0), (64, 8), wrong=wrong)[0]


def test_a_box_is_nan_until_the_wait():
    said, got = load(torch.randn(40, 64).half(), (0, 0), (64, 8), wrong=4)
    assert said == "" and (got == 255).all()


@pytest.mark.parametrize("tensor, box", [
    (torch.zeros(8, 36, dtype=torch.half), (32, 8)),                       # rows of 72 bytes
    (torch.zeros(8 * 64 + 1, dtype=torch.half)[1:].view(8, 64), (64, 8)),  # base not at 16 bytes
    (torch.zeros(8, 64), (64, 8)),                                         # 256 bytes in a swizzled row
    (torch.zeros(300, 64, dtype=torch.half), (64, 257)),
])
def test_tensor_maps_that_the_driver_refuses(tensor, box):
    assert "refused a tile" in load(tensor, (0, 0), box, swizzle=True)[0]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_ring_of_buffers(order):
    tiles, out = torch.randn(7, 128), torch.zeros(7)
    with emulated.order(*order):
        assert call("ring", tiles, 7, 0, out, probe="probe_hopper") == ""
    torch.testing.assert_close(out, tiles.sum(1), atol=1e-4, rtol=1e-5)


def test_a_ring_that_overwrites_full_buffers():
    tiles, out = torch.randn(7, 128), torch.zeros(7)
    said = call("ring", tiles, 7, 1, out, probe="probe_hopper")
    assert "an arrival more than its count" in said or not torch.allclose(out, tiles.sum(1), atol=1e-4)


@pytest.mark.parametrize("wrong, message", [(2, "threads 128: mbarrier at"), (2, "of 128 arrivals and 0 bytes to come"),
                                            (3, "setmaxnreg: warpgroups ask for")])
def test_mistakes_with_rings(wrong, message):
    assert message in call("ring", torch.randn(7, 128), 7, wrong, torch.zeros(7), probe="probe_hopper")


def test_operand_lists_of_the_real_wgmma():
    """The text of the instructions, which no emulation executes: operands in order, d[i] is %i, N = 2 R."""
    header = emulated.ROOT / "csrc" / "cuda" / "common" / "hopper.cuh"
    uses = re.findall(r"^TRISKELE_WGMMA(_S8)?\((\d+), (\d+), (.*)\)$", header.read_text(), re.M)
    assert {name for name, *_ in uses} == {"", "_S8"}
    for name, r, n, operands in uses:
        assert int(n) == 2 * int(r)
        numbers = [int(number) for number in re.findall(r"%(\d+)", operands)]
        assert numbers == list(range(int(r), int(r) + (6 if name else 7)))
    sizes = sorted({int(r) for _, r, *_ in uses})
    probe = "\n".join(f"size {r} TRISKELE_NAMES_{r} TRISKELE_{r}(TRISKELE_F)" for r in sizes)
    done = subprocess.run([*emulated.COMPILER, *emulated.flags(), "-E", "-P", "-x", "c++", "-imacros", header, "-"],
                          input=probe, capture_output=True, text=True)
    lines = re.split(r"\bsize (?=\d)", done.stdout)[1:]
    assert len(lines) == len(sizes), done.stderr
    for r, line in zip(sizes, lines):
        assert [int(number) for number in re.findall(r"%(\d+)", line)] == list(range(r))
        assert [int(a) + int(b or 0) for a, b in re.findall(r"\(d\[(\d+)(?: \+ (\d+))?\]\)", line)] == list(range(r))
