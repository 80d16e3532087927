"""The 4-bit linear with a low-rank branch (SVDQuant)."""

from triskele.ops.svdq.api import svdq_linear

__all__ = ["svdq_linear"]
