"""Sparse-linear attention (arXiv 2509.24006, 2602.12675): which blocks matter, and attention over them."""

from triskele.ops.sla.api import route_blocks, sparse_linear_attention

__all__ = ["route_blocks", "sparse_linear_attention"]
