"""Calibration of 4-bit weights (SVDQuant) and the checkpoint format of nunchaku."""

from triskele.quantize import nunchaku
from triskele.quantize.formats import Quantized, fake_quantize_activation, quantize_weight
from triskele.quantize.smooth import SmoothSearch, search_smooth
from triskele.quantize.svd import LowRankResult, low_rank_branch, truncated_svd
from triskele.quantize.svdquant import GELU_SHIFT, Calibration, svd_quantize, svd_quantize_shared
from triskele.quantize.weight import SVDQWeight

__all__ = ["GELU_SHIFT", "Calibration", "LowRankResult", "Quantized", "SVDQWeight", "SmoothSearch",
           "fake_quantize_activation", "low_rank_branch", "nunchaku", "quantize_weight", "search_smooth",
           "svd_quantize", "svd_quantize_shared", "truncated_svd"]
