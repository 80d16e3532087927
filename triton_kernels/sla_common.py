"""What the SLA kernels share: feature maps, products with a state, and how a launcher sees its tensors.

Conventions of every kernel in `sla_*.py`:

    D, DP        head_dim, and the power of two (>= 16) it is padded to in registers; memory is never padded
    lq, lk       lengths; never constexpr, so a new length does not compile again
    nq, nk       blocks of block_q queries and block_k keys
    *_b *_h *_l  strides of batch, head and row in units of UNIT elements; the stride of D is 1. UNIT is 8 where it
                 divides them all, which tells the compiler that rows are aligned for 16-byte loads, else 1
    bh           sample * heads + head, outermost in the grid: a head's keys and values stay in L2 while it is worked on

Offsets that grow with a tensor are int64. Every masked load names `other`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

FEATURES = ("softmax", "elu", "relu")  # by the kernels' constexpr FEATURE
SCOPES = ("all", "complement", "marginal")  # by SCOPE


# ------------------------------------------------------------------------------------------------ device functions

@triton.jit
def row_stats(x, inside, FEATURE: tl.constexpr):
    """What phi of float32 rows x [M, DP] needs to know of a whole row: for softmax (largest, 1 / sum of e^)."""
    if FEATURE == 0:
        top = tl.max(tl.where(inside, x, float("-inf")), 1)
        inverse = 1.0 / tl.sum(tl.where(inside, tl.exp2((x - top[:, None]) * LOG2E), 0.0), 1)
    else:
        top = tl.zeros([x.shape[0]], tl.float32)
        inverse = top
    return top, inverse


@triton.jit
def phi(x, top, inverse, inside, FEATURE: tl.constexpr):
    """The feature map of float32 rows x [M, C], some or all columns; zero in those not `inside` [1, C]."""
    if FEATURE == 0:
        y = tl.where(inside, tl.exp2((x - top[:, None]) * LOG2E) * inverse[:, None], 0.0)
    elif FEATURE == 1:
        y = tl.where(inside, tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E)), 0.0)
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def phi_backward(x, y, grad, FEATURE: tl.constexpr):
    """d phi(x) -> d x, with y = phi(x)."""
    if FEATURE == 0:
        dx = y * (grad - tl.sum(grad * y, 1)[:, None])
    elif FEATURE == 1:
        dx = grad * tl.minimum(y, 1.0)
    else:
        dx = tl.where(x > 0, grad, 0.0)
    return dx


@triton.jit
def reciprocal(n):
    """1 / n, zero where n is."""
    return tl.where(n == 0, 0.0, 1.0 / tl.where(n == 0, 1.0, n))


@triton.jit
def load_rows(x, rows, row_stride, seen, D: tl.constexpr, DP: tl.constexpr, WHOLE: tl.constexpr = False):
    """x[rows] -> [M, DP]; zero where a row is not `seen` and in the padded columns. WHOLE: every row is seen."""
    cols = tl.arange(0, DP)[None, :]
    at = x + rows.to(tl.int64)[:, None] * row_stride + cols
    if WHOLE and D == DP:
        value = tl.load(at)
    elif WHOLE:
        value = tl.load(at, mask=cols < D, other=0.0)
    else:
        value = tl.load(at, mask=seen[:, None] & (cols < D), other=0.0)
    return value


@triton.jit
def load_columns(x, rows, row_stride, seen, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """x[rows, first : first + CHUNK] -> [M, CHUNK]; zero where a row is not `seen` and beyond column D."""
    cols = (first + tl.arange(0, CHUNK))[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * row_stride + cols, mask=seen[:, None] & (cols < D), other=0.0)


@triton.jit
def load_square(x, D: tl.constexpr, DP: tl.constexpr):
    """A contiguous [D, D] matrix -> [DP, DP]."""
    rows, cols = tl.arange(0, DP)[:, None], tl.arange(0, DP)[None, :]
    return tl.load(x + rows * D + cols, mask=(rows < D) & (cols < D), other=0.0)


@triton.jit
def load_vector(x, D: tl.constexpr, DP: tl.constexpr):
    """A contiguous [D] vector -> [DP]."""
    cols = tl.arange(0, DP)
    return tl.load(x + cols, mask=cols < D, other=0.0)


@triton.jit
def store_rows(x, rows, value, seen, D: tl.constexpr, DP: tl.constexpr):
    """value [M, DP] -> rows of a contiguous [L, D]."""
    cols = tl.arange(0, DP)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * D + cols, value.to(x.dtype.element_ty), mask=seen[:, None] & (cols < D))


@triton.jit
def rows_times_sum(x, rows, row_stride, seen, sums, FEATURE: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
                   CHUNK: tl.constexpr):
    """(phi(x[rows]) . sums, and `row_stats` of the rows) [M], CHUNK columns at a time, as an online softmax."""
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    product = tl.zeros([M], tl.float32)
    for first in range(0, D, CHUNK):
        cols = first + tl.arange(0, CHUNK)
        inside = (cols < D)[None, :]
        z = tl.load(sums + cols, mask=cols < D, other=0.0)[None, :]
        part = load_columns(x, rows, row_stride, seen, first, D, CHUNK).to(tl.float32)
        if FEATURE == 0:
            new = tl.maximum(top, tl.max(tl.where(inside, part, float("-inf")), 1))
            decay = tl.exp2((top - new) * LOG2E)
            e = tl.where(inside, tl.exp2((part - new[:, None]) * LOG2E), 0.0)
            product = product * decay + tl.sum(e * z, 1)
            total = total * decay + tl.sum(e, 1)
            top = new
        else:
            product += tl.sum(phi(part, top, total, inside, FEATURE) * z, 1)
    inverse = 1.0 / total  # (not used by the other feature maps)
    if FEATURE == 0:
        product *= inverse
    return product, top, inverse


@triton.jit
def add_state(acc, x, rows, row_stride, seen, top, inverse, factor, units, scales, FEATURE: tl.constexpr,
              PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr):
    """acc [M, DP] + (factor phi(x[rows])) H, H[d] = scales[d] units[d]: CHUNK columns of phi at a time, so that neither
    it nor H is ever whole in registers. (top, inverse): `row_stats` of the rows."""
    for first in range(0, D, CHUNK):
        cols = first + tl.arange(0, CHUNK)
        inside = cols < D
        f = phi(load_columns(x, rows, row_stride, seen, first, D, CHUNK).to(tl.float32), top, inverse, inside[None, :],
                FEATURE)
        f *= factor[:, None] * tl.load(scales + cols, mask=inside, other=0.0)[None, :]
        unit = load_rows(units, cols, D, inside, D, DP)
        acc = tl.dot(f.to(unit.dtype), unit, acc, input_precision=PRECISION)  # [M, CHUNK] @ [CHUNK, DP] -> [M, DP]
    return acc


@triton.jit
def dot_rows(x, x_rows, x_l, x_seen, y, y_rows, y_l, y_seen, PRECISION: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
             N: tl.constexpr, CHUNK: tl.constexpr):
    """x[x_rows] y[y_rows]^T -> [M, N], CHUNK columns at a time: for float32, of which three tf32 passes hold twice."""
    acc = tl.zeros([M, N], tl.float32)
    for first in range(0, D, CHUNK):
        a = load_columns(x, x_rows, x_l, x_seen, first, D, CHUNK)
        b = load_columns(y, y_rows, y_l, y_seen, first, D, CHUNK)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)  # [M, CHUNK] @ [CHUNK, N] -> [M, N]
    return acc


@triton.jit
def times_units(x, rows, row_stride, seen, units, PRECISION: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                M: tl.constexpr, CHUNK: tl.constexpr):
    """x[rows] units^T -> [M, DP], CHUNK columns of both at a time."""
    acc = tl.zeros([M, DP], tl.float32)
    places = tl.arange(0, DP)
    for first in range(0, D, CHUNK):
        a = load_columns(x, rows, row_stride, seen, first, D, CHUNK)
        unit = load_columns(units, places, D, places < D, first, D, CHUNK)
        acc = tl.dot(a, tl.trans(unit), acc, input_precision=PRECISION)  # [M, CHUNK] @ [CHUNK, DP] -> [M, DP]
    return acc


# ------------------------------------------------------------------------------------------------ launchers' helpers

def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def precision(x: Tensor) -> str:
    """Of products of float32 tiles: float32 inputs get three tensor-core passes, nearly float32; for half inputs one is
    already more exact than they are."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def chunk_of(x: Tensor) -> int:
    """Columns of phi at a time in the products with a state."""
    return 16 if x.dtype == torch.float32 else min(32, padded(x.shape[-1]))


def tile_key(x: Tensor) -> tuple[int, int]:
    """(padded head_dim, bits of the dtype) of x [..., D], as in the tables of tiles."""
    return max(32, padded(x.shape[-1])), x.element_size() * 8


def row_major(x: Tensor) -> Tensor:
    """x with stride 1 along D: most layouts as they are, others copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(*tensors: Tensor) -> tuple[int, list[int]]:
    """(UNIT, the strides of batch, head and row of each tensor in units of it)."""
    strides = [0 if x.shape[i] == 1 else x.stride(i) for x in tensors for i in range(3)]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return unit, [stride // unit for stride in strides]


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def blocks_of(length: int, block: int) -> int:
    return -(-length // block)
