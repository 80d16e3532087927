"""The public ops; each family is a folder: api.py, op.py, backends.py, reference.py."""

from triskele.ops.adaln import adaln_modulate, gate_residual
from triskele.ops.sla import route_blocks, sparse_linear_attention
from triskele.ops.svdq import svdq_linear
from triskele.ops.taa import taa_gamma, taa_residual, taa_update
from triskele.ops.vmoba import vmoba_attention, vmoba_partition, vmoba_select

__all__ = [
    "adaln_modulate", "gate_residual", "route_blocks", "sparse_linear_attention", "svdq_linear", "taa_gamma",
    "taa_residual", "taa_update", "vmoba_attention", "vmoba_partition", "vmoba_select",
]
