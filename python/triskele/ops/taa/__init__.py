"""The fused step of triangular Anderson acceleration (ParaTAA, arXiv 2402.09970)."""

from triskele.ops.taa.api import taa_gamma, taa_residual, taa_update

__all__ = ["taa_gamma", "taa_residual", "taa_update"]
