"""The low-rank branch: truncated SVD, and its alternation with quantization.

    L_1 = SVD_r(W),  Q_i = quant(W - L_i),  L_{i+1} = SVD_r(W - Q_i);  the L_i with the smallest output error is kept
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from triskele.checks import check_choice
from triskele.quantize.formats import Quantized, quantize_weight

EXACT_UP_TO = 256  # min(N, K) above which svd=None takes the randomized one
_OVERSAMPLE, _POWER_ROUNDS = 16, 3


def truncated_svd(matrix: torch.Tensor, rank: int, method: str | None = None, seed: int = 0):
    """matrix [N, K] ~ up [N, r] @ down [r, K]: down the right singular vectors, up the left ones times singular values.

    method "exact" (LAPACK, float64), "randomized" (subspace iteration in the matrix's dtype, the same result for the
    same seed), None: exact where min(N, K) <= 256. Halko, Martinsson, Tropp, arXiv 0909.4061.
    """
    check_choice("svd", method, (None, "exact", "randomized"))
    n, k = matrix.shape
    if rank == 0:
        return matrix.new_zeros(n, 0), matrix.new_zeros(0, k)
    if method is None:
        method = "exact" if min(n, k) <= EXACT_UP_TO else "randomized"
    if method == "exact":
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return (u[:, :rank] * s[:rank]).to(matrix.dtype), vh[:rank].to(matrix.dtype)
    columns = min(rank + _OVERSAMPLE, n, k)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device gets the same numbers
    probe = torch.randn(k, columns, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe).Q  # [N, c]
    for _ in range(_POWER_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u[:, :rank]) * s[:rank], vh[:rank]


@dataclass(frozen=True, eq=False)
class LowRankResult:
    """up [N, r], down [r, K] in smoothed space; errors: one a round (squared output error); best: index of the kept."""

    up: torch.Tensor
    down: torch.Tensor
    errors: torch.Tensor
    best: int
    quantized: Quantized


def output_error(residual, quantized, z=None, zq=None) -> float:
    """Sum of squares of z R^T - zq Q^T; without activations of R - Q."""
    difference = residual - quantized if z is None else z @ residual.T - zq @ quantized.T
    return float(difference.double().square().sum())


def mean_square(z: torch.Tensor) -> torch.Tensor:
    """Of each column, float32 [K]; relative to the largest, so that no power of it overflows."""
    top = z.abs().amax()
    return (z / torch.where(top > 0, top, torch.ones_like(top))).square().mean(0).float()


def low_rank_branch(weight, rank: int, z=None, zq=None, *, format="int4", group=64, dtype=torch.float32,
                    iterations=100, early_stop=True, svd=None, seed=0, scales="amax") -> LowRankResult:
    """The alternation above on a smoothed weight [N, K].

    z, zq       activations divided by smooth, as they are and fake-quantized [M, K]; None: the error of the weight
    early_stop  end at the first round that is worse than the one before
    """
    errors, best, quantized_part = [], None, 0
    importance = None if z is None else mean_square(z)
    for i in range(iterations):
        up, down = truncated_svd(weight - quantized_part, rank, svd, seed)
        residual = weight - up @ down
        quantized = quantize_weight(residual, format, group, dtype, scales, importance)
        quantized_part = quantized.dequantize(weight.dtype)
        errors.append(output_error(residual, quantized_part, z, zq))
        if best is None or errors[-1] < errors[best[0]]:
            best = (i, up, down, quantized)
        if rank == 0 or (early_stop and i > 0 and errors[-1] > errors[-2]):
            break
    i, up, down, quantized = best
    return LowRankResult(up, down, torch.tensor(errors, dtype=torch.float64), i, quantized)
