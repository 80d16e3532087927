"""GELU in the 4-bit linear before it: one pass over the wide activations of a feed-forward less.

diffusers' `GELU` module is a linear and the activation. Where its linear is in 4 bits, the module's class becomes a
subclass that has the linear apply both; children, parameters and their names stay what they are. Whatever else has been
put in the linear's place or hooked to it since (LoRA, casting, offload by layer) runs as without the patch.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import nn

from triskele.diffusers.undo import UndoLog
from triskele.nn import SVDQuantLinear

EPILOGUES = {"none": "gelu", "tanh": "gelu_tanh"}
"""`approximate` of torch's GELU -> epilogue of `svdq_linear`."""


class FusedGELU(GELU):
    """A `GELU` whose `proj` is, as long as nothing wraps it, an SVDQuantLinear that applies the activation itself."""

    def forward(self, hidden_states):
        if takes_epilogue(self.proj):
            return self.proj(hidden_states, epilogue=EPILOGUES[self.approximate])
        return super().forward(hidden_states)


def takes_epilogue(linear: nn.Module) -> bool:
    """Whether `linear` is ours with nothing around it that would see or change its own output."""
    return type(linear) is SVDQuantLinear and not (
        "forward" in linear.__dict__ or linear._forward_hooks or linear._backward_hooks or linear._backward_pre_hooks)


def linear_then_gelu(linear: nn.Module, activation: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """activation(linear(x)), in one where that is possible: for linears whose GELU is a module beside them."""
    if type(activation) is nn.GELU and takes_epilogue(linear) and not activation._forward_hooks:
        return linear(x, epilogue=EPILOGUES[activation.approximate])
    return activation(linear(x))


def fuse(module: nn.Module, undo: UndoLog) -> bool:
    """Make `module`, the parent of a linear in 4 bits, a FusedGELU where it is diffusers' GELU; whether it is one."""
    if type(module) is not GELU or module.approximate not in EPILOGUES:
        return False
    undo.call(lambda: _separate(module))
    module.__class__ = FusedGELU
    return True


def _separate(module: nn.Module) -> None:
    if type(module) is FusedGELU:
        module.__class__ = GELU
