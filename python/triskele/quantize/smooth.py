"""The smoothing search: smooth = amax|x|^alpha / amax|W|^beta over a grid, scored by the layer's output error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from triskele.quantize.formats import fake_quantize_activation, quantize_weight
from triskele.quantize.svd import mean_square, output_error, truncated_svd

GRID = ((0.0, 0.0), *((i / 20, 0.0) for i in range(1, 20)), *((i / 20, 1 - i / 20) for i in range(1, 20)))


@dataclass(frozen=True, eq=False)
class SmoothSearch:
    """smooth [K] float32, the best of `alpha_beta` [39, 2] at `index`; errors [39]: squared output error of each."""

    smooth: torch.Tensor
    index: int
    alpha_beta: torch.Tensor
    errors: torch.Tensor


def smooth_scales(x_max: torch.Tensor, w_max: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """x_max^alpha / w_max^beta [K]; one where a channel is zero on either side."""
    scales = x_max.pow(alpha) / w_max.pow(beta)
    return torch.where((x_max > 0) & (w_max > 0) & torch.isfinite(scales) & (scales > 0), scales,
                       torch.ones_like(scales))


def smoothed_activations(x, smooth, activation: str, shift: float = 0.0):
    """(z, zq) = x / smooth, and what its quantized form stands for once the bias has taken the shift back."""
    z = x.float() / smooth.float()
    if shift == 0.0:
        return z.to(x.dtype), fake_quantize_activation(z, activation, dtype=x.dtype)
    shifted = (x.float() + shift) / smooth.float()
    return z.to(x.dtype), fake_quantize_activation(shifted, activation, True, x.dtype) - shift / smooth.to(x.dtype)


def search_smooth(weight, activations, rank: int = 32, *, format="int4", group=64, activation="int8", shift=0.0,
                  svd=None, seed=0, dtype=torch.float32, scales="amax") -> SmoothSearch:
    """The published search: each of 39 (alpha, beta), one SVD a candidate, quantization on; the last among equals wins.

    weight [N, K] and activations [M, K] in the dtype to compute with (float32 or float64).
    """
    x_max, w_max = activations.abs().amax(0).float(), weight.abs().amax(0).float()
    errors, best = [], None
    for i, (alpha, beta) in enumerate(GRID):
        smooth = smooth_scales(x_max, w_max, alpha, beta)
        z, zq = smoothed_activations(activations, smooth, activation, shift)
        smoothed = weight * smooth.to(weight.dtype)
        up, down = truncated_svd(smoothed, rank, svd, seed)
        residual = smoothed - up @ down
        quantized = quantize_weight(residual, format, group, dtype, scales, mean_square(z)).dequantize(weight.dtype)
        errors.append(output_error(residual, quantized, z, zq))
        if best is None or errors[-1] <= errors[best[0]]:
            best = (i, smooth)
    return SmoothSearch(best[1], best[0], torch.tensor(GRID, dtype=torch.float64),
                        torch.tensor(errors, dtype=torch.float64))
