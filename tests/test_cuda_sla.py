"""csrc/cuda/sla_forward_sm90.cu, run thread by thread on the CPU: budgets against float64, published vectors, hostile
inputs; the index arithmetic of csrc/cuda/sla_tiles.cuh by itself; what the table's entry refuses.

    python tests/test_cuda_sla.py [64 72 128]       a wider grid: every feature, scope and join at these head_dims,
                                                    threads in random order
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import subprocess
import sys

import cuda_offline
import emulated
import pytest
import torch
from conftest import Vectors, vector_files
from generators import heads_last, poisoned, strided, with_outliers
from sla_cases import FEATURES, SCOPES, Published, at_precision, problem
from tolerance import assert_relative, assert_within_budget

from triskele import backend
from triskele.ops.sla import cuda_backend
from triskele.ops.sla.op import _fitting
from triskele.ops.sla.reference import Settings

needs_emulator = pytest.mark.skipif(bool(emulated.why_not()), reason="; ".join(emulated.why_not()))
B16, F16 = torch.bfloat16, torch.float16
NARROW = [path for pattern in ("sla_main_*d64_*q128k64*", "sla_sla1_*d64_*q128k64*")
          for path in vector_files("attention", pattern)]
WIDE = vector_files("attention", "sla_main_*d128_*q128k64*")


def attend(q, k, v, block_map, weight=None, bias=None, alpha=None, key_mask=None, feature="softmax", scope="all",
           scale=None, parts=True, block_q=128, block_k=64):
    """The kernel, called as the table's entry calls it."""
    settings = Settings(_fitting(block_q, q), _fitting(block_k, k), feature, scope, scale or q.shape[3] ** -0.5)
    arguments = q, k, v, block_map, weight, bias, alpha, key_mask, settings, parts
    assert cuda_backend.why_not(*arguments) == []
    return cuda_backend.forward(*arguments, native=emulated.load("sla_forward_sm90"))


def joined(kind: str, shape) -> dict:
    dim = shape[3]
    return {"projection": {"weight": torch.randn(dim, dim) * dim ** -0.5, "bias": torch.randn(dim)},
            "bare weight": {"weight": torch.randn(dim, dim) * dim ** -0.5, "bias": torch.zeros(dim)},
            "alpha": {"alpha": torch.rand(shape[:3])}, "none": {}}[kind]


def check_budget(shape, lk, dtype, feature, scope, join, mask=False, parts=True, outliers=False, seed=0):
    q, k, v, block_map, key_mask = problem(shape, lk, dtype, 128, 64, mask=mask, seed=seed)
    if outliers:
        q, k, v = with_outliers(q, 30), with_outliers(k, 30), with_outliers(v)
    if shape[2] <= 128:
        block_map[:, :, :, 0] = 1  # the last row of blocks, which `problem` empties, is the only one
    extra, settings = joined(join, shape), Settings(128, 64, feature, scope, shape[3] ** -0.5)
    truth = at_precision(torch.float64, q, k, v, block_map, settings, key_mask=key_mask, **extra)
    # float16 would overflow in the reference's sums, which no kernel keeps in it: what bfloat16 loses, over 8
    same = at_precision(B16, q, k, v, block_map, settings, key_mask=key_mask, **extra)
    if dtype == F16:
        same = [t + (s.double() - t) / 8 for s, t in zip(same, truth)]
    got = attend(q, k, v, block_map, key_mask=key_mask, feature=feature, scope=scope, parts=parts, **extra)
    for name, actual, want, rough in list(zip(("o", "o_sparse", "o_linear"), got, truth, same))[:3 if parts else 1]:
        assert actual.dtype == dtype
        assert_within_budget(actual, want, rough, what=f"{name} {shape} {lk} {dtype} {feature} {scope} {join}")
    finite = ~truth[3].isinf()
    assert torch.equal(got[3].isinf(), ~finite)
    scale = max(1.0, float(truth[3][finite].abs().max())) if finite.any() else 1.0
    assert_within_budget(got[3][finite], truth[3][finite], truth[3][finite].float(), floor=3e-6 * scale, what="lse")


@needs_emulator
@pytest.mark.parametrize("shape, lk, dtype, feature, scope, join, mask, parts", [
    ((1, 2, 300, 64), 400, B16, "softmax", "all", "projection", False, False),   # W folded into H
    ((1, 2, 300, 64), 400, B16, "elu", "complement", "projection", False, True),
    ((2, 1, 200, 64), 333, F16, "relu", "marginal", "alpha", True, True),
    ((1, 2, 260, 128), 700, F16, "softmax", "all", "projection", True, True),
    ((1, 1, 130, 128), 450, B16, "softmax", "all", "alpha", False, False),
    ((1, 1, 130, 72), 200, B16, "elu", "all", "projection", True, False),
    ((2, 1, 150, 80), 190, F16, "softmax", "all", "none", False, True),
    ((1, 3, 63, 8), 33, B16, "softmax", "marginal", "projection", True, True),   # one block that holds it all
    ((1, 1, 1, 40), 1, F16, "elu", "complement", "alpha", False, True),
    ((1, 1, 140, 64), 700, B16, "softmax", "all", "none", False, False),
])
def test_error_budget(shape, lk, dtype, feature, scope, join, mask, parts):
    check_budget(shape, lk, dtype, feature, scope, join, mask, parts)


@needs_emulator
def test_a_wide_scope():
    check_budget((1, 1, 140, 120), 300, F16, "softmax", "complement", "projection")


@needs_emulator
@pytest.mark.parametrize("dtype", [B16, F16], ids=str)
@pytest.mark.parametrize("feature, scope", [("softmax", "all"), ("elu", "marginal"), ("relu", "all")])
def test_outliers(feature, scope, dtype):
    check_budget((1, 1, 130, 64), 320, dtype, feature, scope, "none", outliers=True)


@needs_emulator
def test_sums_that_a_float16_does_not_hold():
    """phi(k)^T v of 500 keys reaches 10^7; the averages that the kernel multiplies with do not."""
    q, k, v = torch.rand(1, 1, 128, 64), 200 * torch.rand(1, 1, 500, 64), 100 + 10 * torch.randn(1, 1, 500, 64)
    q, k, v = q.half(), k.half(), v.half()
    block_map = torch.zeros(1, 1, 1, 8, dtype=torch.int8)
    for scope in ("all", "complement"):
        truth = at_precision(torch.float64, q, k, v, block_map, Settings(128, 64, "relu", scope, 0.125))[2]
        got = attend(q, k, v, block_map, feature="relu", scope=scope)[2]
        assert_relative(got, truth, 2e-3)


# ------------------------------------------------------------------------------------------------ published vectors

def check_vectors(path):
    case = Published(Vectors(path), F16 if "fp16" in path.stem else B16)
    parts = attend(case.q, case.k, case.v, case.map, case.weight, case.bias, feature=case.feature, scope=case.scope,
                   **case.blocks)
    for name, actual in zip(("o", "o_s", "o_l"), parts):
        assert_relative(actual[:, :, case.rows], case.vectors[name], 2e-2, name)
        assert_relative(actual.double().mean(-1), case.vectors[f"rowmean_{name}"], 2e-2, f"rowmean_{name}")
    assert_relative(parts[3] / math.log(2), case.vectors["lse2"], 1e-3, "lse2")


@needs_emulator
@pytest.mark.parametrize("path", [*NARROW, *WIDE], ids=lambda p: p.stem)
def test_vectors(path):
    check_vectors(path)


# ------------------------------------------------------------------------------------------------ hostile inputs

@needs_emulator
def test_layouts_give_the_same_bits():
    q, k, v, block_map, key_mask = problem((2, 2, 140, 40), 77, B16, 128, 64, mask=True)
    for mask in (None, key_mask):
        want = attend(q, k, v, block_map, key_mask=mask)
        for layout in (strided, heads_last, poisoned):
            got = attend(*map(layout, (q, k, v)), strided(block_map), key_mask=None if mask is None else strided(mask))
            for a, b in zip(got, want):
                assert torch.equal(a, b)


@needs_emulator
@pytest.mark.parametrize("scope", SCOPES)
def test_masked_keys_may_hold_anything(scope):
    q, k, v, block_map, key_mask = problem((2, 1, 140, 16), 200, B16, 128, 64, mask=True)
    hidden = ~key_mask[:, None, :, None].expand_as(k)
    want = attend(q, k, v, block_map, key_mask=key_mask, scope=scope)
    got = attend(q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf), block_map, key_mask=key_mask,
                 scope=scope)
    for a, b in zip(got, want):
        assert torch.equal(a, b) and not a.isnan().any()


@needs_emulator
def test_rows_without_critical_keys_are_zero():
    q, k, v, block_map, _ = problem((1, 1, 300, 64), 150, B16, 128, 64)
    block_map[:, :, 0] = torch.tensor([0, -1, 0], dtype=torch.int8)  # no critical block
    block_map[:, :, 1] = torch.tensor([1, 0, 0], dtype=torch.int8)   # its keys are all masked
    block_map[:, :, 2] = 1
    key_mask = torch.ones(1, 150, dtype=torch.bool)
    key_mask[:, :64] = False
    _, o_sparse, o_linear, lse = attend(q, k, v, block_map, key_mask=key_mask, scope="complement")
    assert (o_sparse[:, :, :256] == 0).all() and (lse[:, :, :256] == -math.inf).all()
    assert (o_sparse[:, :, 256:] != 0).any(-1).all() and lse[:, :, 256:].isfinite().all()
    assert (o_linear[:, :, 256:] == 0).all() and (o_linear[:, :, :256] != 0).any(-1).all()  # an empty scope


@needs_emulator
def test_a_number_that_is_none_stays_in_its_rows():
    q, k, v, block_map, _ = problem((1, 2, 300, 64), 150, B16, 128, 64)
    block_map[:] = 1
    q[0, 0, 7, 3] = math.nan
    o, _, _, lse = attend(q, k, v, block_map)
    assert o[0, 0, 7].isnan().all() and lse[0, 0, 7].isnan()
    assert o.isnan().any(-1).sum() == 1 and lse.isnan().sum() == 1


@needs_emulator
@pytest.mark.parametrize("batch, heads, lq, lk", [(0, 1, 8, 8), (1, 0, 8, 8), (1, 1, 0, 8), (1, 2, 130, 0)])
def test_empty(batch, heads, lq, lk):
    q, k = torch.randn(batch, heads, lq, 16).bfloat16(), torch.randn(batch, heads, lk, 16).bfloat16()
    block_map = torch.ones(batch, heads, -(-lq // 128), -(-lk // 64), dtype=torch.int8)
    weight, bias = torch.randn(16, 16), torch.randn(16)
    for scope in SCOPES:
        o, o_sparse, o_linear, lse = attend(q, k, k, block_map, weight, bias, scope=scope)
        assert o.shape == o_sparse.shape == o_linear.shape == q.shape and lse.shape == q.shape[:3]
        assert torch.equal(o, bias.bfloat16().expand_as(o)) and (o_linear == 0).all() and (lse == -math.inf).all()


# ------------------------------------------------------------------------------------------------ schedule

@needs_emulator
def test_neither_order_nor_grid_changes_a_bit():
    q, k, v, block_map, _ = problem((1, 3, 400, 64), 600, B16, 128, 64, keep=0.5)
    weight, bias = torch.randn(64, 64), torch.randn(64)
    want = attend(q, k, v, block_map, weight, bias, parts=False)
    for count in (1, 5, 40):  # blocks of the persistent grid: several tiles each, an uneven rest, a tile each
        with emulated.processors(count):
            got = attend(q, k, v, block_map, weight, bias, parts=False)
            assert torch.equal(got[3], want[3])
            assert_relative(got[0], want[0], 1e-2)  # the states add other segments, in order
    for name in ("backward", "random"):
        with emulated.order(name, 5):
            got = attend(q, k, v, block_map, weight, bias, parts=False)
            assert torch.equal(got[0], want[0]) and torch.equal(got[3], want[3])


SHIM = """
#define __host__
#define __device__
#include "cuda/sla_tiles.cuh"
using namespace triskele::cuda::sla;
#define API extern "C" __attribute__((visibility("default")))
API int64_t count(int first, int heads, int q_blocks) { return Tiles{first, heads, q_blocks}.count(); }
API void at(int first, int heads, int q_blocks, int64_t i, int* out) {
  const Tile tile = Tiles{first, heads, q_blocks}.at(i);
  out[0] = tile.head, out[1] = tile.block;
}
API int stages(int selected) { return stages_of(selected); }
API int row(int j, int k_blocks) { return box_row(j, k_blocks); }
API uint64_t there(int j, int keys) { return keys_there(j, keys); }
API int segment(int k_blocks, int heads, int wanted) { return blocks_a_segment(k_blocks, heads, wanted); }
API int at_a_time(int heads, int64_t bytes, int64_t limit) { return heads_at_a_time(heads, bytes, limit); }
API void ring(int steps, int* out) {
  Ring<3> ring;
  for (int i = 0; i < steps; ++i, ring.advance()) out[2 * i] = ring.slot, out[2 * i + 1] = int(ring.parity);
}
"""


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """csrc/cuda/sla_tiles.cuh as a C library."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "shim.cpp").write_text(SHIM)
    subprocess.run([*emulated.COMPILER, "-std=c++20", "-shared", "-fPIC", f"-I{emulated.ROOT / 'csrc'}", "-o",
                    folder / "shim.so", folder / "shim.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    library.count.restype = ctypes.c_int64
    library.there.restype = ctypes.c_uint64
    library.at.restype = library.ring.restype = None
    library.at.argtypes = [ctypes.c_int] * 3 + [ctypes.c_int64, ctypes.c_void_p]
    library.at_a_time.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


@pytest.mark.parametrize("first, heads, q_blocks, grid", [(0, 12, 256, 132), (5, 3, 7, 4), (0, 1, 1, 1),
                                                          (2, 40, 591, 132)])
def test_the_schedule_visits_every_tile_once(tiles, first, heads, q_blocks, grid):
    count, place = tiles.count(first, heads, q_blocks), (ctypes.c_int * 2)()
    assert count == heads * q_blocks
    seen = []
    for block in range(grid):
        last = first - 1
        for index in range(block, count, grid):
            tiles.at(first, heads, q_blocks, index, place)
            assert place[0] >= last  # a thread block goes through the heads in order
            last = place[0]
            seen.append((place[0], place[1]))
    assert sorted(seen) == list(itertools.product(range(first, first + heads), range(q_blocks)))
    wave = {tiles.at(first, heads, q_blocks, i, place) or place[0] for i in range(min(grid, count))}
    assert len(wave) <= grid // q_blocks + 2  # blocks that run together share heads


def test_the_schedule_counts_past_32_bits(tiles):
    place = (ctypes.c_int * 2)()
    tiles.at(0, 100_000, 50_000, 4_999_999_999, place)
    assert tiles.count(0, 100_000, 50_000) == 5_000_000_000 and tuple(place) == (99_999, 49_999)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128, 129, 1025, 32760])
def test_boxes_and_keys_cover_the_length(tiles, keys):
    blocks, seen = -(-keys // 64), []
    for j in range(blocks):
        word = tiles.there(j, keys)
        seen += [tiles.row(j, blocks) + t for t in range(64) if word >> t & 1]
    assert seen == list(range(keys))
    assert tiles.row(-1, blocks) >= keys and tiles.there(-1, keys) == 0  # an empty half: past the last key
    assert tiles.row(-1, 0) > 0 and tiles.there(-1, 0) == 0


def test_stages_and_rings(tiles):
    assert [tiles.stages(n) for n in (0, 1, 2, 3, 26)] == [1, 1, 1, 2, 13]
    steps = (ctypes.c_int * 20)()
    tiles.ring(10, steps)
    assert list(steps[::2]) == [i % 3 for i in range(10)] and list(steps[1::2]) == [i // 3 % 2 for i in range(10)]


@pytest.mark.parametrize("k_blocks, heads, wanted", [(512, 12, 132), (1, 1, 264), (5, 300, 264), (1182, 40, 264),
                                                     (7, 1, 6)])
def test_segments_cover_the_blocks(tiles, k_blocks, heads, wanted):
    step = tiles.segment(k_blocks, heads, wanted)
    assert step >= 4
    assert heads * -(-k_blocks // step) <= max(heads, wanted)


def test_heads_at_a_time(tiles):
    assert tiles.at_a_time(12, 0, 100) == 12 and tiles.at_a_time(12, 30, 100) == 3
    assert tiles.at_a_time(12, 300, 100) == 1 and tiles.at_a_time(2, 1, 100) == 2


# ------------------------------------------------------------------------------------------------ machine code

@pytest.mark.skipif(bool(cuda_offline.why_not()), reason="; ".join(cuda_offline.why_not()))
def test_the_softmax_stands_between_the_two_waits(tmp_path):
    """ptxas moves a wait up over arithmetic that does not need it; O += P V would then not run beside the softmax.
    In the main loop: wait for S (one product still under way), 64 exponentials or more, wait for O."""
    stem = "sla_forward_sm90"
    sources = cuda_offline.closure(cuda_offline.SOURCES / f"{stem}.cu")
    library = cuda_offline.LIBRARY
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        library = cuda_offline.compiled(stem, tmp_path)
    found = {}
    for part in cuda_offline.output(cuda_offline.tool("cuobjdump"), "-sass", library).split("Function : ")[1:]:
        if "14forward_kernel" in (name := part.split(maxsplit=1)[0]) and stem in name:
            loop = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1(.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0", part, re.S)
            found[name] = loop[1].count("MUFU.EX2")
    assert len(found) == 4 and min(found.values()) >= 64, found


# ------------------------------------------------------------------------------------------------ the entry

def inputs(shape=(1, 1, 300, 64), lk=300, dtype=B16, block_q=128, block_k=64, scale=0.125):
    q, k = torch.zeros(shape, dtype=dtype), torch.zeros(*shape[:2], lk, shape[3], dtype=dtype)
    block_map = torch.ones(*shape[:2], -(-shape[2] // block_q), -(-lk // block_k), dtype=torch.int8)
    return q, k, k, block_map, None, None, None, None, Settings(block_q, block_k, "softmax", "all", scale), False


@pytest.mark.parametrize("change, reasons", [
    ({}, []),
    ({"dtype": F16, "shape": (1, 1, 300, 120)}, []),
    ({"shape": (1, 1, 40, 64), "lk": 30, "block_q": 40, "block_k": 30}, []),
    ({"shape": (1, 1, 40, 64), "lk": 30, "block_q": 100, "block_k": 31}, []),
    ({"dtype": torch.float32}, ["takes float16 and bfloat16, got torch.float32"]),
    ({"shape": (1, 1, 300, 136)}, ["takes head_dim D <= 128 in multiples of 8, got 136"]),
    ({"shape": (1, 1, 300, 60)}, ["takes head_dim D <= 128 in multiples of 8, got 60"]),
    ({"block_q": 64}, ["takes block_q 128, got 64"]),
    ({"block_q": 256, "block_k": 128}, ["takes block_q 128, got 256", "takes block_k 64, got 128"]),
    ({"shape": (1, 1, 70, 64), "lk": 40, "block_q": 64, "block_k": 32},
     ["takes block_q 128, got 64", "takes block_k 64, got 32"]),
    ({"scale": 0.0}, ["takes a scale above zero, got 0.0"]),
    ({"scale": -1.0}, ["takes a scale above zero, got -1.0"]),
])
def test_why_not(change, reasons):
    assert cuda_backend.why_not(*inputs(**change)) == reasons


def test_the_entry_is_first_and_unverified():
    entry = backend.TABLES["sla.forward"][0]
    assert entry.name == "cuda" and entry.run is cuda_backend.forward and entry.verified == ()
    assert backend.explain("sla.forward", *inputs()).reasons["cuda"] == ["takes cuda tensors, got cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_the_machine_lacks():
    assert backend.TABLES["sla.forward"][0].missing() == ["torch sees no CUDA device"]


def test_missing_names_the_capability(monkeypatch):
    from triskele import _native
    monkeypatch.setattr(_native, "cuda_library", lambda: [])
    for chip, reasons in (((9, 0), []), ((8, 9), ["needs compute capability 9.0, got 8.9"]),
                          ((10, 0), ["needs compute capability 9.0, got 10.0"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, chip=chip: chip)
        assert backend.TABLES["sla.forward"][0].missing() == reasons


def test_layouts_that_tma_does_not_take_are_copied():
    x = torch.randn(2, 3, 40, 64).bfloat16()
    assert cuda_backend.loadable(x) is x and cuda_backend.loadable(heads_last(x)).stride(1) == 64
    odd = torch.randn(2, 3, 40, 65).bfloat16()
    for layout in (strided(x), x.mT.contiguous().mT, x[:1, :1, :1].expand(2, 3, 40, 64), odd[..., :64], odd[..., 1:],
                   torch.randn(2 * 3 * 40 * 64 + 1).bfloat16()[1:].view(2, 3, 40, 64)):
        ready = cuda_backend.loadable(layout)
        assert torch.equal(ready, layout) and ready.is_contiguous() and ready.data_ptr() % 16 == 0


@needs_emulator
def test_the_native_op_guards_itself():
    ops = emulated.load("sla_forward_sm90")
    q, k, v, block_map, *_ = inputs()
    for change, message in (
            (dict(q=q.double()), "q in bfloat16 or float16"), (dict(k=k.half()), "k and v of the dtype of q"),
            (dict(v=v[:, :, :-1]), "keys: expected 300, got 299"),
            (dict(q=strided(q)), "rows at multiples of 16 bytes"),
            (dict(block_q=64), "expected block_q 128"), (dict(block_k=32), "expected block_k 64"),
            (dict(scale=-1.0), "a scale above zero"), (dict(block_map=block_map.float()), "an int8 map"),
            (dict(block_map=block_map[:, :, :1]), "map query blocks: expected 3, got 1"),
            (dict(weight=torch.ones(3)), "weight elements: expected 4096"),
            (dict(weight=torch.ones(64, 64).half()), "float32 weight"),
            (dict(bias=torch.ones(64)), "a bias beside its weight"),
            (dict(key_mask=torch.ones(1, 7, dtype=torch.bool)), "key_mask elements: expected 300, got 7")):
        call = dict(q=q, k=k, v=v, block_map=block_map, weight=None, bias=None, alpha=None, key_mask=None, block_q=128,
                    block_k=64, feature=0, scope=0, scale=0.125, parts=False) | change
        with pytest.raises(RuntimeError, match=message):
            ops.sla_forward(*call.values())


if __name__ == "__main__":
    dims = [int(word) for word in sys.argv[1:]] or [64, 72, 128]
    grid = itertools.product(dims, FEATURES, SCOPES, ("projection", "bare weight", "alpha", "none"))
    for seed, (dim, feature, scope, join) in enumerate(grid):
        for dtype, mask in ((B16, False), (F16, True)):
            with emulated.order("random", seed):
                check_budget((1, 2, 300, dim), 333, dtype, feature, scope, join, mask,
                             parts=join != "projection" or mask, seed=seed)
            print("held", dim, feature, scope, join, dtype, flush=True)
    sys.exit(0)
