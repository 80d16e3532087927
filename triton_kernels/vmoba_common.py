"""What the VMoBA kernels share: tokens in chunk order, strides that tell the compiler their alignment.

Conventions of every kernel in `vmoba_*.py`:

    position     a place in chunk order; chunk c holds positions bounds[c] ... bounds[c + 1] - 1
    token        a place in the caller's order; order[position], int64 (without ORDERED: the position itself)
    mask         bytes [B, C, H, S] by token; a query sees its own chunk whatever its byte says
    range        `size` neighbouring tokens, whose queries one program owns
    D, DP        head_dim, and the power of two (>= 16) it is padded to in registers
    *_b *_h *_l  strides of batch, head and token in units of UNIT elements; the stride of D is 1
    bh           sample * heads + head, outermost in every grid: a head's keys and values stay in L2 meanwhile

Q, K, V and their gradients are read and written through `order`, row by row: no copy of them in chunk order exists.
Sizes are never constexpr and never specialised: a new length, grid or number of chunks does not compile again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.configs import Tile, chip_of, lookup
from triskele.triton_kernels.sla_common import LOG2E, tile_key

SIZES = ["heads", "length", "chunks", "tiles", "ranges", "size", "scale", "q_b", "q_h", "q_l", "k_b", "k_h", "k_l",
         "v_b", "v_h", "v_l", "g_b", "g_h", "g_l"]


@triton.jit
def tokens_at(order, positions, seen, ORDERED: tl.constexpr):
    """int64: the tokens at these positions; 0 where not `seen`."""
    if ORDERED:
        tokens = tl.load(order + positions, mask=seen, other=0)
    else:
        tokens = tl.where(seen, positions, 0).to(tl.int64)
    return tokens


@triton.jit
def weights_of(s, scale, shift, PRECISION: tl.constexpr):
    """exp(s scale - shift), in one fused step for halves; for float32 inputs the difference comes first, so that large
    scores are not rounded again in units of log2."""
    if PRECISION == "tf32x3":
        p = tl.exp2((s * scale - shift) * LOG2E)
    else:
        p = tl.exp2(s * (scale * LOG2E) - shift * LOG2E)
    return p


def tile_of(table: dict, x: Tensor) -> Tile:
    """The tile of x [..., D] on its device; one whose columns are padded may have an entry of its own, "<128"."""
    width, bits = tile_key(x)
    ragged = f"<{width}"
    own = x.shape[-1] < width and (chip_of(x.device), ragged, bits) in table
    return lookup(table, x.device, ragged if own else width, bits)


def strides_of(*tensors: Tensor) -> tuple[int, tuple[int, ...]]:
    """(UNIT, the strides of batch, head and token of each tensor in that unit): 8 elements, one 16-byte load of halves,
    where every stride is a multiple, so that rows of 72 or 80 elements are read whole; else 1."""
    strides = [0 if x.shape[i] == 1 else x.stride(i) for x in tensors for i in range(3)]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    return unit, tuple(s // unit for s in strides)
