"""svd_quantize: one linear layer's weight to 4 bits and a low-rank branch (SVDQuant, arXiv 2411.05007)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from triskele.checks import check_choice, check_int, check_shape, check_tensor, expected
from triskele.quantize.formats import ACTIVATIONS, check_scales, group_size, pack_nibbles, pad_columns, quantize_weight
from triskele.quantize.smooth import SmoothSearch, search_smooth, smoothed_activations
from triskele.quantize.svd import low_rank_branch, mean_square, output_error
from triskele.quantize.weight import SVDQWeight

GELU_SHIFT = 0.171875  # GELU >= -0.17; the published constant, exact in every 16-bit format
_FLOAT64_UP_TO = 2**17  # elements of a weight that is calibrated in float64; larger ones in float32


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one call of `svd_quantize` found: the smoothing search (None where none ran), the squared errors of the
    low-rank rounds and the index of the kept one, and |y - y'| / |y| of the stored layer on the activations given
    (|W - W'| / |W| in smoothed space where none were)."""

    smooth: SmoothSearch | None
    low_rank_errors: torch.Tensor
    low_rank_best: int
    relative_error: float


def _finite(name: str, tensor: torch.Tensor) -> None:
    values = tensor.float() if tensor.element_size() == 1 else tensor  # no isfinite in float8
    if not bool(torch.isfinite(values).all()):
        raise expected(name, "finite values", "NaN or infinity")


def _storage_dtype(weight, dtype) -> torch.dtype:
    if dtype is None:
        return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
    check_choice("dtype", dtype, (torch.float16, torch.bfloat16, torch.float32))
    return dtype


def svd_quantize(weight, activations=None, rank=32, group=64, format="int4", activation="int8", *, smooth="search",
                 iterations=None, early_stop=True, svd=None, shift=0.0, dtype=None, seed=0,
                 scales="amax") -> SVDQWeight:
    """W diag(smooth) = R + L, rank(L) = rank, R in 4 bits: y = quant(x / smooth) R^T + x lora_down^T lora_up^T.

    weight       [N, K], any floating dtype
    activations  [..., K]: inputs of the layer to calibrate on; None: the error of the weight itself is made small
    rank         of the branch, 0 … min(N, K)
    group        columns a scale: 64 for int4 (any multiple of 16), always 16 for nvfp4; K need not be a multiple
    format       "int4" or "nvfp4"; activation: "int8", "int4", "fp8", "nvfp4" or "none" (triskele.quantize.formats)
    smooth       "search": the best of the published 39 where activations are given, else ones; None: ones; or a tensor
                 [K] of positive values
    iterations   most rounds of the SVD/quantize alternation: None is 100 with activations and 10 without;
                 early_stop: end at the first round that is worse
    svd          "exact", "randomized" (seeded by `seed`), or None: by size
    shift        0.171875 after a GELU: x + shift >= 0 is what R sees; int4 activations are then unsigned
    dtype        of scales and factors: None is the weight's (float32 for float64). Smooth and factors are rounded
                 before the residual is taken, so R makes up for their rounding
    scales       "amax": max|r| / 7 of a group. "integer" (int4): small multiples of one scale an output channel, chosen
                 by error, which kernels multiply without floating point inside a channel; in every Q above

    Raises ValueError for a rank above min(N, K), NaN or infinity anywhere, and shapes that do not fit.
    Source: arXiv 2411.05007, sections 4.1 and 4.2.
    """
    check_tensor("weight", weight, dim=2, floating=True)
    n, k = weight.shape
    if n == 0 or k == 0:
        raise expected("weight", "at least one row and one column", list(weight.shape))
    check_int("rank", rank, low=0, high=min(n, k))
    group = group_size(format, group)
    check_scales(scales, format)
    check_choice("activation", activation, ACTIVATIONS)
    check_int("iterations", 1 if iterations is None else iterations, low=1)
    dtype = _storage_dtype(weight, dtype)
    if weight.is_meta:
        raise expected("weight", "a tensor with data", "one on the meta device")
    weight = weight.detach()
    _finite("weight", weight)
    compute = torch.float64 if weight.numel() <= _FLOAT64_UP_TO else torch.float32
    weight = weight.to(compute)
    x = None
    if activations is not None:
        check_tensor("activations", activations, floating=True)
        if activations.dim() == 0 or activations.shape[-1] != k:
            raise expected("activations", f"shape [..., {k}]", list(activations.shape))
        x = activations.detach().reshape(-1, k).to(weight.device, compute)
        _finite("activations", x)
        if x.shape[0] == 0:
            raise expected("activations", "at least one token", list(activations.shape))
        if shift > 0 and float(x.min()) < -shift:
            raise expected("activations", f"values >= -shift = {-shift}", float(x.min()))

    options = dict(format=format, group=group, dtype=dtype, svd=svd, seed=seed, scales=scales)
    search = None
    if isinstance(smooth, torch.Tensor):
        check_shape("smooth", smooth, (k,))
        _finite("smooth", smooth)
        smoothing = smooth.detach().to(weight.device).float()
    elif smooth not in ("search", None):
        raise expected("smooth", "'search', None or a tensor", repr(smooth))
    elif smooth == "search" and x is not None:
        search = search_smooth(weight, x, rank, activation=activation, shift=shift, **options)
        smoothing = search.smooth
    else:
        smoothing = torch.ones(k, device=weight.device)
    smoothing = smoothing.to(dtype)
    if not bool(((smoothing > 0) & torch.isfinite(smoothing)).all()):
        raise expected("smooth", f"positive values that are finite in {dtype}", float(smoothing.min()))

    smoothed = weight * smoothing.to(compute)
    z = zq = None
    if x is not None:
        z, zq = smoothed_activations(x, smoothing, activation, shift)
    iterations = (10 if x is None else 100) if iterations is None else iterations
    branch = low_rank_branch(smoothed, rank, z, zq, iterations=iterations, early_stop=early_stop, **options)

    lora_down = (branch.down / smoothing.to(compute)).to(dtype)
    lora_up = branch.up.to(dtype)
    residual = smoothed - lora_up.to(compute) @ (lora_down.to(compute) * smoothing.to(compute))
    quantized = quantize_weight(residual, format, group, dtype, scales, None if z is None else mean_square(z))
    error = output_error(residual, quantized.dequantize(compute), z, zq)
    norm = float((smoothed if z is None else z @ smoothed.T).double().square().sum())
    report = Calibration(search, branch.errors, branch.best, (error / norm) ** 0.5 if norm else 0.0)
    return SVDQWeight(
        pack_nibbles(pad_columns(quantized.codes, group)),
        quantized.scales.to(torch.float8_e4m3fn if format == "nvfp4" else dtype), lora_down.contiguous(),
        lora_up.contiguous(), smoothing, k,
        format, activation, quantized.tensor_scale, float(shift), report)


def svd_quantize_shared(weights, activations=None, **options) -> list[SVDQWeight]:
    """Weights that read the same input (q, k, v) as one: one smooth, one lora_down, one set of activation codes.

    weights: [N_i, K] each; options: those of `svd_quantize`. Returns one SVDQWeight each, sharing those tensors.
    """
    weights = list(weights)
    if not weights:
        raise expected("weights", "at least one tensor", "none")
    for i, weight in enumerate(weights):
        check_tensor(f"weights[{i}]", weight, dim=2, floating=True)
        check_shape(f"weights[{i}]", weight, (None, weights[0].shape[1]))
    return svd_quantize(torch.cat(weights), activations, **options).split([w.shape[0] for w in weights])
