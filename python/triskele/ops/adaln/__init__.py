"""Layer norm with a modulation a timestep, and the gated residual: what stands between a block's matrix products."""

from triskele.ops.adaln.api import adaln_modulate, gate_residual

__all__ = ["adaln_modulate", "gate_residual"]
