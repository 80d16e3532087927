"""Modules that hold the parameters of the arms."""

from triskele.nn.sla import SparseLinearAttention
from triskele.nn.svdq import SVDQuantLinear
from triskele.nn.vmoba import VMoBAAttention

__all__ = ["SVDQuantLinear", "SparseLinearAttention", "VMoBAAttention"]
