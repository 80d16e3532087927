"""The launches of the adaLN kernels that are held to compile: see triton_offline.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from triton_offline import Case

from triskele.triton_kernels import adaln


def _case(dtype: torch.dtype, table: torch.dtype, channels: int, affine: bool, indexed: bool) -> Case:
    x = torch.empty(2, 1000, channels, dtype=dtype, device="meta")
    chunks = torch.empty(3, 3 * channels, dtype=table, device="meta").chunk(3, 1)
    index = torch.empty(2, dtype=torch.int64, device="meta") if indexed else None
    scale, shift, gate = chunks if indexed else (t[:1] for t in chunks)
    vector = torch.empty(channels, dtype=table, device="meta") if affine else None

    def call():
        adaln.modulate(x, scale, shift, index, vector, vector, 1e-6)
        adaln.gate(x, x, gate, index)
    names = [str(d).removeprefix("torch.") for d in (dtype, table)]
    return Case(f"adaln {names[0]} table={names[1]} C={channels}{' affine' * affine}{' indexed' * indexed}", call)


def cases(chip: int, full: bool) -> Iterator[Case]:
    floats = torch.bfloat16, torch.float16, torch.float32
    if full:
        for dtype, table, channels, affine in product(floats, floats, (7, 384, 1536, 3072, 16384), (False, True)):
            yield _case(dtype, table, channels, affine, affine)
        return
    at = (80, 89, 90, 100, 120).index(chip)
    yield _case(torch.bfloat16, floats[at % 2], 3072 if at % 2 else 1536, bool(at % 2), bool(at % 3))
    yield _case(floats[at % 3], torch.float32, 16384 if at % 2 else 1153, not at % 2, not at % 3)


def targets(chip: int) -> Iterator[Case]:
    """A FLUX.1 block."""
    yield _case(torch.bfloat16, torch.bfloat16, 3072, False, False)
