"""What the VMoBA attention kernels walk, made from the mask on the device:

    chunk_queries   for each chunk the queries that see it, and where those of each range of tokens start
    key_tiles       the tiles of keys, none of which spans two chunks

All ascend, so sums run in one order on every run. Lists have room for everything, since their lengths are not known on
the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.sla_common import blocks_of
from triskele.triton_kernels.vmoba_common import SIZES, tokens_at


@triton.jit
def chunk_of_kernel(order, bounds, out, ORDERED: tl.constexpr, TILE: tl.constexpr):
    """out[token] = c for the tokens of one chunk."""
    c = tl.program_id(0)
    first, stop = tl.load(bounds + c), tl.load(bounds + c + 1)
    for start in range(first, stop, TILE):
        positions = start + tl.arange(0, TILE)
        seen = positions < stop
        tl.store(out + tokens_at(order, positions, seen, ORDERED), tl.zeros([TILE], tl.int32) + c, mask=seen)


@triton.jit(do_not_specialize=SIZES)
def chunk_queries_kernel(mask, chunk_of, lists, starts, heads, length, chunks, ranges, RANGE: tl.constexpr):
    """The tokens whose query sees one chunk."""
    c, bh = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    mask += ((bh // heads * chunks + c) * heads + bh % heads) * length
    lists += (bh * chunks + c) * length
    starts += (bh * chunks + c) * (ranges + 1)
    count = 0
    for r in range(0, ranges):
        tl.store(starts + r, count)
        tokens = r * RANGE + tl.arange(0, RANGE)
        inside = tokens < length
        chosen = tl.load(mask + tokens, mask=inside, other=0)
        hit = inside & ((chosen != 0) | (tl.load(chunk_of + tokens, mask=inside, other=-1) == c))
        ones = hit.to(tl.int32)
        tl.store(lists + count + tl.cumsum(ones, 0) - 1, tokens, mask=hit)
        count += tl.sum(ones, 0)
    tl.store(starts + ranges, count)


@triton.jit(do_not_specialize=["chunks", "room"])
def key_tiles_kernel(bounds, tiles, chunks, room, BN: tl.constexpr, TILE: tl.constexpr):
    """The tiles of one chunk, behind those of the chunks before it."""
    c = tl.program_id(0)
    at = 0
    for start in range(0, c, TILE):
        i = start + tl.arange(0, TILE)
        sizes = tl.load(bounds + i + 1, mask=i < c, other=0) - tl.load(bounds + i, mask=i < c, other=0)
        at += tl.sum((sizes + BN - 1) // BN, 0)
    first = tl.load(bounds + c)
    end = at + (tl.load(bounds + c + 1) - first + BN - 1) // BN
    for start in range(at, end, TILE):
        i = start + tl.arange(0, TILE)
        tl.store(tiles + 2 * i, tl.zeros([TILE], tl.int32) + c, mask=i < end)
        tl.store(tiles + 2 * i + 1, first + (i - at) * BN, mask=i < end)
    if c == chunks - 1:
        for start in range(end, room, TILE):
            i = start + tl.arange(0, TILE)
            tl.store(tiles + 2 * i, tl.full([TILE], -1, tl.int32), mask=i < room)


# ------------------------------------------------------------------------------------------------ launchers

@dataclass(frozen=True)
class Queries:
    """Who sees which chunk.

    lists   tokens int32 [B, H, C, S], ascending; only as many as there are, are set
    starts  int32 [B, H, C, ranges + 1]: where in a chunk's list the tokens of each range of `size` start, and its end
    """

    lists: Tensor
    starts: Tensor
    size: int

    @property
    def ranges(self) -> int:
        return self.starts.shape[3] - 1


def chunk_of_tokens(order: Tensor | None, bounds: Tensor, length: int) -> Tensor:
    """int32 [S]: the chunk of each token."""
    out = bounds.new_empty((length,), dtype=torch.int32)
    chunk_of_kernel[(bounds.shape[0] - 1,)](bounds if order is None else order, bounds, out, ORDERED=order is not None,
                                            TILE=1024, num_warps=4)
    return out


def chunk_queries(mask: Tensor, order: Tensor | None, bounds: Tensor) -> Queries:
    """mask: bool [B, C, H, S]. A range is what one program owns: long, so that the queries of a chunk fill tiles, but
    not so long that programs are too few for the device."""
    batch, chunks, heads, length = mask.shape
    size = next((n for n in (1024, 512) if batch * heads * blocks_of(length, n) >= 256), 256)
    lists = mask.new_empty((batch, heads, chunks, length), dtype=torch.int32)
    starts = mask.new_empty((batch, heads, chunks, blocks_of(length, size) + 1), dtype=torch.int32)
    queries = Queries(lists, starts, size)
    chunk_queries_kernel[(batch * heads * chunks,)](
        mask.contiguous().view(torch.uint8), chunk_of_tokens(order, bounds, length), lists, starts, heads, length,
        chunks, queries.ranges, RANGE=size, num_warps=4)
    return queries


def key_tiles(bounds: Tensor, length: int, cols: int) -> Tensor:
    """int32 [room, 2]: (chunk, first position) of each tile of up to `cols` keys; chunk -1 past the last one."""
    chunks = bounds.shape[0] - 1
    room = length // cols + chunks  # a chunk has one short tile at most
    tiles = bounds.new_empty((room, 2), dtype=torch.int32)
    key_tiles_kernel[(chunks,)](bounds, tiles, chunks, room, BN=cols, TILE=256, num_warps=4)
    return tiles
