"""What VMoBA would cost if tiles of neighbouring queries walked the union of the chunks that any of their rows sees,
instead of gathering the queries of each chunk, as the kernels do. Over what the rows selected themselves, that is

    union / average = sum over tiles of (rows of the tile) (keys of its union)  /  sum over queries of its own keys

Printed by partition, selection and tile: for queries in chunk order, and for queries reordered within a head so that
like choices stand together ("sorted"). Inputs are drawn, by how alike neighbours are: noise alone ("0"), or fields that
change over so many tokens along h and w (and half as many along t), and noise of a quarter of their variance. One head,
on the CPU.

    python bench/vmoba_union.py [--grid 21 30 52] [--alike 0 2 4 8] [--rows 64 128]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from triskele.ops import vmoba_partition, vmoba_select
from triskele.ops.vmoba.partition import VMoBAPartition
from triskele.ops.vmoba.reference import self_mask

# Published for Wan2.1-1.3B at 81 x 480 x 832: chunk, top_k per query; and a threshold per head on the same chunks.
SETTINGS = [(3, 2), ((5, 13), 6), ((7, 5, 13), 18)]


def field(grid: tuple[int, int, int], dim: int, alike: float) -> torch.Tensor:
    """[1, 1, S, D], unit variance."""
    noise = torch.randn(dim, *grid)
    if alike > 0:
        coarse = [max(2, round(n / scale) + 1) for n, scale in zip(grid, (alike / 2, alike, alike))]
        smooth = F.interpolate(torch.randn(1, dim, *coarse), grid, mode="trilinear", align_corners=True)[0]
        noise = (smooth / smooth.std() * 2 + noise) / 5 ** 0.5
    return noise.flatten(1).T[None, None].contiguous()


def keys_of(seen: torch.Tensor, sizes: torch.Tensor, rows: int) -> float:
    """Keys a query, on average, of the unions of tiles of `rows`. seen: bool [C, S] in the order of the tiles."""
    total = 0.0
    for part in seen.split(rows, 1):
        total += float((part.any(1) * sizes).sum()) * part.shape[1]
    return total / seen.shape[1]


def by_choice(seen: torch.Tensor) -> torch.Tensor:
    """The queries, those of like choices together: sorted by the bits of their choice, the first chunk highest."""
    order = torch.arange(seen.shape[1])
    for bits in seen.flip(0):
        order = order[bits[order].int().argsort(stable=True)]
    return order


def report(partition: VMoBAPartition, name: str, q: torch.Tensor, k: torch.Tensor, rows: list[int], **setting) -> None:
    length = q.shape[2]
    mask = vmoba_select(q, k, chunk=partition, **setting)[0, :, 0]
    seen = mask | self_mask(partition.order, partition.bounds, length)
    seen = seen[:, partition.order]
    sizes = partition.bounds.diff().float()
    average = float((seen * sizes[:, None]).sum()) / length
    sorted_ = seen[:, by_choice(seen)]
    ratios = [f"{n}: {keys_of(seen, sizes, n) / average:5.2f} (sorted {keys_of(sorted_, sizes, n) / average:5.2f})"
              for n in rows]
    print(f"{name:<34}{average / length:8.1%} of the keys; union / average at rows {'  '.join(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52))
    parser.add_argument("--alike", type=float, nargs="+", default=(0, 2, 4, 8))
    parser.add_argument("--rows", type=int, nargs="+", default=(64, 128))
    parser.add_argument("--dim", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    grid = tuple(args.grid)
    for alike in args.alike:
        q, k = field(grid, args.dim, alike), field(grid, args.dim, alike)
        q = (q + k) / 2 ** 0.5  # a query matches keys near it
        for chunk, top_k in SETTINGS:
            partition = vmoba_partition(grid, chunk)
            name = f"alike {alike:g}, chunk {chunk}"
            report(partition, f"{name}, top {top_k}", q, k, args.rows, select="topk", pool="query", top_k=top_k)
            report(partition, f"{name}, 0.25", q, k, args.rows, select="threshold", pool="head", threshold=0.25)


if __name__ == "__main__":
    main()
