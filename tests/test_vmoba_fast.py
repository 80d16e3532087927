"""VMoBA's CPU kernels at the edges of what they cut queries, keys and head dims into: tiles, strips, visits, ranges."""

from __future__ import annotations

import pytest
import torch
from generators import heads_last, poisoned, strided, with_outliers
from tolerance import assert_within_budget
from vmoba_cases import dense, draw, with_gradients

from triskele.ops import vmoba_attention, vmoba_partition, vmoba_select

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("o", "dq", "dk", "dv")
SHAPES = [  # tokens, head dim, chunk
    (5, 8, 2), (16, 24, 16), (17, 32, 1), (33, 64, 15), (63, 72, 64), (65, 128, 31), (97, 256, 33), (128, 24, 127),
    (129, 64, 128), (161, 8, 130), (193, 72, 65), (200, 32, 3), (257, 128, 129), (150, 256, 96), (320, 64, 63)]


def check(tensors, upstream, mask, chunk, dtype, what=""):
    """Output and gradients of the kernel within the budget of the same formula in torch."""
    def kernel(*x):
        return vmoba_attention(*x, chunk=chunk, mask=mask, backend="cpu")

    truth = with_gradients(lambda *x: dense(*x, mask, chunk), [x.double() for x in tensors], upstream)
    same = with_gradients(lambda *x: dense(*x, mask, chunk), tensors, upstream)
    for name, a, t, s in zip(NAMES, with_gradients(kernel, tensors, upstream), truth, same):
        assert a.dtype == dtype and a.isfinite().all(), f"{what} {name}"
        # P is computed anew in the backward, from a rounded lse; autograd kept its own.
        assert_within_budget(a, t, s, factor=2.0 if name == "o" else 4.0, what=f"{what} {name}")


def random_mask(heads, length, chunk, share=0.4, together=1):
    """bool [1, C, H, S]: each run of `together` queries chooses alike."""
    chunks = -(-length // chunk)
    runs = torch.rand(1, chunks, heads, -(-length // together)) < share
    return runs.repeat_interleave(together, -1)[..., :length]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, dim, chunk", SHAPES)
def test_ragged_shapes(length, dim, chunk, dtype):
    q, k, v, do = draw(1, 2, length, dim, count=4, dtype=dtype)
    check((q, k, v), do, random_mask(2, length, chunk), chunk, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_chunk(dtype):
    for chunk in (1, 2, 5, 16, 17, 31, 32, 34, 47, 48, 49, 64, 66, 95, 100, 112, 130):
        q, k, v, do = draw(1, 1, 131, 16, count=4, dtype=dtype)
        check((q, k, v), do, random_mask(1, 131, chunk), chunk, dtype, f"chunk {chunk}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("together", [1, 64, 1000])
def test_more_than_one_range_and_segment(together, dtype):
    """Queries beyond 2048, chunks beyond 512 keys; choices that differ by query, and that neighbours share."""
    q, k, v, do = draw(1, 1, 2100, 16, count=4, dtype=dtype)
    check((q, k, v), do, random_mask(1, 2100, 600, together=together), 600, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_unequal_size(dtype):
    chunk = vmoba_partition((7, 9, 11), (4, 5, 3))
    q, k, v, do = draw(1, 2, 693, 40, count=4, dtype=dtype)
    mask = vmoba_select(q, k, chunk=chunk, select="threshold", pool="head", threshold=0.3)
    check((q, k, v), do, mask, chunk, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64, 72])
def test_outliers(dim, dtype):
    q, k, v, do = draw(1, 2, 210, dim, count=4, dtype=dtype)
    q, v, do, mask = with_outliers(q, 10.0, 0.02), with_outliers(v), with_outliers(do), random_mask(2, 210, 70)
    check((q, k, v), do, mask, 70, dtype)
    # Outliers in k too put all weight on one key. Forward only: dS is a difference of equal numbers there.
    k = with_outliers(k, 5.0, 0.02)
    o, same = vmoba_attention(q, k, v, chunk=70, mask=mask, backend="cpu"), dense(q, k, v, mask, 70)
    assert_within_budget(o, dense(q.double(), k.double(), v.double(), mask, 70), same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_and_fall_along_the_keys(dtype):
    """The base of a row's exponents has to follow; and falling scores must not pull it down."""
    q, k, v, do = draw(1, 1, 300, 32, count=4, dtype=dtype)
    q = (q * 0.1 + 1).to(dtype)
    for ramp in (torch.linspace(-4, 4, 300), torch.linspace(4, -4, 300)):
        keys = (k * 0.3 + ramp[:, None]).to(dtype)
        check((q, keys, v), do, torch.ones(1, 2, 1, 300, dtype=torch.bool), 150, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_below_zero(dtype):
    """exp(-lse) overflows: what pads the keys must not be weighed by it."""
    q, k, v, do = draw(1, 1, 75, 64, count=4, dtype=dtype)
    q, k = (q * 0.1 + 4).to(dtype), (k * 0.1 - 4).to(dtype)
    check((q, k, v), do, random_mask(1, 75, 19), 19, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_of_nan_stays_alone(dtype):
    q, k, v, do = draw(1, 1, 140, 24, count=4, dtype=dtype)
    mask = torch.ones(1, 3, 1, 140, dtype=torch.bool)
    how = {"chunk": 50, "mask": mask, "backend": "cpu"}
    clean = with_gradients(lambda *x: vmoba_attention(*x, **how), (q, k, v), do)
    q[0, 0, 71, 5] = float("nan")
    dirty = with_gradients(lambda *x: vmoba_attention(*x, **how), (q, k, v), do)
    others = torch.arange(140) != 71
    for a, b in zip(clean[:2], dirty[:2]):
        assert torch.equal(a[:, :, others], b[:, :, others]) and b[:, :, 71].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 72, 128])
def test_layouts_and_poisoned_margins_change_no_bit(dim, dtype):
    q, k, v, do = draw(1, 2, 99, dim, count=4, dtype=dtype)
    mask = random_mask(2, 99, 35)

    def run(*x):
        return vmoba_attention(*x, chunk=35, mask=mask, backend="cpu")

    plain = with_gradients(run, (q, k, v), do)
    for layout in (strided, heads_last, poisoned):
        tensors, how = [layout(x) for x in (q, k, v)], (None, bounds(99, 35), mask, "cpu")
        out, lse = torch.ops.triskele.vmoba_attention(*tensors, *how)
        grads = torch.ops.triskele.vmoba_attention_backward(layout(do), *tensors, layout(out), poisoned(lse), *how)
        for name, a, b in zip(NAMES, (out, *grads), plain):
            assert torch.equal(a, b), f"{layout.__name__} {name}"


def bounds(length, chunk):
    return torch.tensor([*range(0, length, chunk), length], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, heads, length, chunk", [(1, 3, 700, 90), (2, 2, 300, 170), (1, 1, 2300, 700)])
def test_same_bits_whatever_the_number_of_threads(batch, heads, length, chunk, dtype):
    """Numbers of threads that divide the heads and that do not: the backward adds up dQ in two ways."""
    q, k, v, do = draw(batch, heads, length, 24, count=4, dtype=dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            mask = vmoba_select(q, k, chunk=chunk, top_k=2)
            runs.append([mask, *with_gradients(lambda *x: vmoba_attention(*x, chunk=chunk, top_k=2), (q, k, v), do)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_who_is_gathered_with_it(dtype):
    q, k, v = draw(1, 1, 256, 64, dtype=dtype)
    mask = random_mask(1, 256, 64, 0.5)
    together = vmoba_attention(q, k, v, chunk=64, mask=mask)
    fewer = mask.clone()
    fewer[..., ::3] = False  # every third query leaves the lists
    alone = vmoba_attention(q, k, v, chunk=64, mask=fewer)
    rest = torch.arange(256) % 3 != 0
    assert torch.equal(together[:, :, rest], alone[:, :, rest]) and not torch.equal(together, alone)
