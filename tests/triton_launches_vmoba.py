"""The launches of the VMoBA kernels that are held to compile: see triton_offline.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from triton_offline import HALF, Case

from triskele.triton_kernels import vmoba_backward, vmoba_forward, vmoba_select

HEAD_DIMS = (32, 64, 72, 80, 128)
MODES = [("topk", "query"), ("threshold", "query"), ("topk", "all"), ("threshold", "head")]  # one a way in the kernels
MATRIX = ("vmoba_forward_kernel", "vmoba_queries_kernel", "vmoba_keys_kernel")


def _case(chip: int, dtype: torch.dtype, dim: int, ordered: bool, odd: bool, modes, heads: int = 4,
          length: int = 4000, chunks: int = 9) -> Case:
    """odd: rows that do not start at whole 16 bytes; modes: of selection. length, chunks: not multiples of 16, the
    kernels may not rely on it."""
    wide = torch.empty(1, heads, length, dim + 1 if odd else dim, dtype=dtype, device="meta")
    q, lse = wide[..., :dim], torch.empty(1, heads, length, device="meta")
    order = torch.empty(length, dtype=torch.int64, device="meta") if ordered else None
    bounds = torch.empty(chunks + 1, dtype=torch.int32, device="meta")
    mask = torch.empty(1, chunks, heads, length, dtype=torch.bool, device="meta")

    def call():
        for mode, pool in modes:
            vmoba_select.select(q, q, order, bounds, mode, pool, 3, 0.25)
        vmoba_forward.forward(q, q, q, order, bounds, mask)
        vmoba_backward.backward(q, q, q, q, q, lse, order, bounds, mask)

    matrix = {} if dtype == torch.float32 else dict.fromkeys(MATRIX, HALF[chip])
    name = f"vmoba {str(dtype).removeprefix('torch.')} D={dim}{' ordered' * ordered}{' odd rows' * odd}"
    return Case(name, call, matrix)


def cases(chip: int, full: bool) -> Iterator[Case]:
    if full:
        for dtype, dim, ordered, odd in product((torch.bfloat16, torch.float16, torch.float32), HEAD_DIMS,
                                                (True, False), (False, True)):
            yield _case(chip, dtype, dim, ordered, odd, MODES)
        return
    # every head_dim somewhere; which chip gets which, shifts from chip to chip
    at = (80, 89, 90, 100, 120).index(chip)
    half = torch.float16 if at % 2 else torch.bfloat16
    dims = HEAD_DIMS[at:] + HEAD_DIMS[:at]
    yield _case(chip, half, dims[0], False, True, MODES[:2])
    yield _case(chip, half, 128 if dims[0] != 128 else 64, True, False, MODES[2:])
    yield _case(chip, torch.float32, dims[2], True, False, MODES[:1])


def targets(chip: int) -> Iterator[Case]:
    """Wan2.1-1.3B at 81 x 480 x 832, chunks of 7 x 5 x 13 tokens."""
    yield _case(chip, torch.bfloat16, 128, True, False, [("topk", "query"), ("threshold", "head")], 12, 32760, 72)
