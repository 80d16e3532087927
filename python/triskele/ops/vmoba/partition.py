"""Cuts a token grid (t, h, w) into chunks: which tokens sit together, and in which order."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch

from triskele.checks import check_int, check_same, check_tensor, expected

TARGET_CHUNKS = 8
"""`default_chunk` aims at this many chunks: an eighth of the tokens each."""


@dataclass(frozen=True, eq=False)
class VMoBAPartition:
    """The tokens of one sample in chunk order.

    order    int64 [S]: the token (in the caller's order) that stands at each position; chunks are runs of positions
    inverse  int64 [S]: the position of each token
    bounds   int32 [C + 1]: chunk c holds the positions bounds[c] ... bounds[c + 1] - 1
    """

    order: torch.Tensor
    inverse: torch.Tensor
    bounds: torch.Tensor

    def __post_init__(self):
        for name, dtype in (("order", torch.int64), ("inverse", torch.int64), ("bounds", torch.int32)):
            value = getattr(self, name)
            check_tensor(name, value, dim=1)
            check_same(name, value, self.order, "order", dtype=False)
            if value.dtype != dtype:
                raise expected(name, f"dtype {dtype}", value.dtype)
        if self.inverse.shape != self.order.shape:
            raise expected("inverse", f"shape {list(self.order.shape)}", list(self.inverse.shape))
        if self.bounds.numel() < 2:
            raise expected("bounds", "at least 2 entries", self.bounds.numel())

    @property
    def num_tokens(self) -> int:
        return self.order.shape[0]

    @property
    def num_chunks(self) -> int:
        return self.bounds.shape[0] - 1

    def to(self, device: torch.device | str) -> VMoBAPartition:
        """The same partition on `device`."""
        return VMoBAPartition(self.order.to(device), self.inverse.to(device), self.bounds.to(device))


def vmoba_partition(grid: tuple[int, int, int], chunk) -> VMoBAPartition:
    """order: t h w -> (chunks)(tokens of a chunk), raster order in both; inverse = order^-1; bounds = chunk starts, S.

    Args:
        grid: (t, h, w), the tokens of one sample in raster order, S = t h w.
        chunk: the chunk's size in tokens of the grid:
            int      temporal: that many whole frames; the order stays raster order
            float    the same in frames that need not be whole: floor(chunk h w) tokens (0.5: half a frame)
            (ch, cw)       spatial: all frames of a ch x cw window
            (ct, ch, cw)   spatio-temporal
            A size larger than its axis spans that axis; where an axis does not divide, its last chunks are smaller.

    Returns:
        VMoBAPartition with `.order`, `.inverse` int64 [S] and `.bounds` int32 [C + 1], on the CPU (`.to(device)`).

    Raises:
        ValueError: a grid or chunk that is not made of positive numbers.

    Source: VMoBA (arXiv 2506.23858), section 3.2, layer-wise recurrent partition.
    """
    t, h, w = _check_grid(grid)
    if isinstance(chunk, (int, float)) and not isinstance(chunk, bool):
        length = _frames_to_tokens(chunk, t, h * w)
        total = t * h * w
        order = torch.arange(total)
        starts = torch.arange(-(-total // length) + 1) * length
        return VMoBAPartition(order, order.clone(), starts.clamp(max=total).to(torch.int32))
    sizes = _check_chunk(chunk)
    if len(sizes) == 2:
        sizes = (t, *sizes)
    # Each token's chunk number, chunks counted in raster order over the grid of chunks; the stable sort keeps the
    # raster order inside a chunk.
    index = [torch.arange(n) // min(c, n) for n, c in zip((t, h, w), sizes)]
    counts = [-(-n // min(c, n)) for n, c in zip((t, h, w), sizes)]
    chunk_of = (index[0][:, None, None] * counts[1] + index[1][:, None]) * counts[2] + index[2]
    order = torch.argsort(chunk_of.flatten(), stable=True)
    members = _members(counts, sizes, (t, h, w))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), members.cumsum(0)]).to(torch.int32)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    return VMoBAPartition(order, inverse, bounds)


def default_chunk(grid: tuple[int, int, int], kind: int):
    """A chunk for `vmoba_partition` that holds about an eighth of the grid's tokens.

    kind 0 temporal, 1 spatial, 2 spatio-temporal. A video of fewer than four frames is cut within its frames by the
    temporal kind too: whole frames would leave too few chunks to choose from.
    """
    t, h, w = _check_grid(grid)
    check_int("kind", kind, low=0, high=2)
    if kind == 0:
        return max(1, round(t / TARGET_CHUNKS)) if t >= 4 else max(t / TARGET_CHUNKS, 1 / (h * w))
    frames = range(1, min(t, TARGET_CHUNKS) + 1) if kind == 2 else (1,)
    cuts = [(a, b, c) for a in frames for b in range(1, min(h, TARGET_CHUNKS) + 1)
            for c in range(1, min(w, TARGET_CHUNKS) + 1)]

    axes = [axis for axis in ((0, 1, 2) if kind == 2 else (1, 2)) if grid[axis] > 1]

    def badness(cut):  # the number of chunks, then how alike the numbers of cuts are, then how square a window is
        pieces = [cut[axis] for axis in axes] or [1]
        window = -(-h // cut[1]), -(-w // cut[2])
        miss = abs(math.log(math.prod(cut) / TARGET_CHUNKS))
        return miss, max(pieces) / min(pieces), max(window) / min(window), cut

    cut = min(cuts, key=badness)
    sizes = tuple(-(-n // c) for n, c in zip((t, h, w), cut))
    return sizes if kind == 2 else sizes[1:]


def _check_grid(grid) -> tuple[int, int, int]:
    if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != 3:
        raise expected("grid", "(t, h, w)", repr(grid))
    for name, size in zip(("grid t", "grid h", "grid w"), grid):
        check_int(name, size, low=1)
    if math.prod(grid) > torch.iinfo(torch.int32).max:
        raise expected("grid", "at most 2^31 - 1 tokens a sample", tuple(grid))
    return tuple(operator.index(size) for size in grid)  # makes constants of them where torch.compile traces


def _check_chunk(chunk) -> tuple[int, ...]:
    if not isinstance(chunk, (tuple, list)) or len(chunk) not in (2, 3):
        raise expected("chunk", "frames (int or float), (ch, cw) or (ct, ch, cw)", repr(chunk))
    for size in chunk:
        check_int("chunk", size, low=1)
    return tuple(chunk)


def _frames_to_tokens(frames: float, all_frames: int, per_frame: int) -> int:
    if not 0 < frames < math.inf:
        raise expected("chunk", "a positive number of frames", repr(frames))
    length = math.floor(min(frames, all_frames) * per_frame + 1e-6)  # 0.29 frames of 100 tokens are 29, not 28.999...
    if length < 1:
        raise expected("chunk", f"at least one token (1/{per_frame} of a frame)", repr(frames))
    return length


def _members(counts, sizes, grid) -> torch.Tensor:
    """Tokens of each chunk, int64 [C]: the product of what the chunk has along each axis."""
    per_axis = []
    for count, size, n in zip(counts, sizes, grid):
        starts = torch.arange(count) * min(size, n)
        per_axis.append((n - starts).clamp(max=min(size, n)))
    return (per_axis[0][:, None, None] * per_axis[1][:, None] * per_axis[2]).flatten()
