"""The launches of the SLA kernels that are held to compile: see triton_offline.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from triton_offline import HALF, Case

from triskele.ops.sla.reference import Settings
from triskele.triton_kernels import sla_backward, sla_forward, sla_route

FEATURES, SCOPES = ("softmax", "elu", "relu"), ("all", "complement", "marginal")
HEAD_DIMS = (32, 64, 72, 80, 128)
BLOCKS = 128, 64
MATRIX = ("forward_kernel", "queries_kernel", "keys_kernel")
LINEAR = ("key_states_kernel", "query_states_kernel")


def _case(chip: int, dtype: torch.dtype, dim: int, scope: str, feature: str, mask: bool, branch: str,
          heads: int = 4, length: int = 4000) -> Case:
    """branch: what joins the sparse one; "proj" folded, "parts" also with o_linear, "alpha" or "none". length: not a
    multiple of 16, the kernels may not rely on it."""
    q = torch.empty(1, heads, length, dim, dtype=dtype, device="meta")
    wide, rows = (torch.empty(shape, device="meta") for shape in (q.shape, q.shape[:3]))
    block_map = torch.empty(1, heads, -(-length // BLOCKS[0]), -(-length // BLOCKS[1]), dtype=torch.int8,
                            device="meta")
    seen = torch.empty(1, length, dtype=torch.bool, device="meta") if mask else None
    weight, bias = torch.empty(dim, dim, device="meta"), torch.empty(dim, device="meta")
    given = {"alpha": (None, None, rows), "none": (None, None, None)}.get(branch, (weight, bias, None))
    settings = Settings(*BLOCKS, feature, scope, dim ** -0.5)

    def call():
        sla_route.route(q, q, 3, 2 if mask else 0, *BLOCKS, seen, seen)
        sla_forward.forward(q, q, q, block_map, *given, seen, settings, branch == "parts")
        d_linear = None if branch == "none" else wide
        sla_backward.backward(q, q, q, block_map, q, q, rows, wide, d_linear, rows if mask else None, seen, settings)

    matrix = {}
    if dtype != torch.float32:  # (tf32 products take what the compiler finds for three passes)
        matrix = dict.fromkeys(MATRIX, HALF[chip])
        if branch != "none":  # an outer product is [D, D]: too small for a warpgroup's instruction below 64
            matrix.update(dict.fromkeys(LINEAR, HALF[chip] if dim >= 64 else ("HMMA",)))
    name = f"sla {str(dtype).removeprefix('torch.')} D={dim} {scope} {feature} {branch}{' masked' * mask}"
    return Case(name, call, matrix)


FULL = (  # scope, feature map, mask, branch
    ("all", "softmax", False, "proj"), ("complement", "elu", True, "parts"), ("marginal", "relu", False, "alpha"),
    ("all", "softmax", True, "none"), ("complement", "softmax", True, "parts"))


def cases(chip: int, full: bool) -> Iterator[Case]:
    if full:
        for dtype, dim, options in product((torch.bfloat16, torch.float32), HEAD_DIMS, FULL):
            yield _case(chip, dtype, dim, *options)
        return
    # every head_dim, scope, feature map and branch somewhere; which chip gets which, shifts from chip to chip
    at = (80, 89, 90, 100, 120).index(chip)
    half = torch.float16 if at % 2 else torch.bfloat16
    yield _case(chip, half, HEAD_DIMS[at - 3], "complement", FEATURES[at % 3], True, "parts")  # 72, 80, 128, 32, 64
    if at % 2:
        yield _case(chip, torch.float32, HEAD_DIMS[at], "marginal", "softmax", False, "alpha")
    yield _case(chip, half, HEAD_DIMS[at - 1], "all", "softmax", False, "proj")  # 128, 32, 64, 72, 80


def targets(chip: int) -> Iterator[Case]:
    """Wan2.1-1.3B at 81 x 480 x 832."""
    for scope in ("all", "complement"):
        yield _case(chip, torch.bfloat16, 128, scope, "softmax", False, "proj", 12, 32760)
