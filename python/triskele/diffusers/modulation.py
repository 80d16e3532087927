"""The norms, modulations and gates around a block's matrix products, fused: one pass over the tokens each.

A block's forward is replaced by its adapter's version of it, which calls `adaln_modulate` and `gate_residual` between
the block's own attentions and linears, so whatever another arm, a LoRA or a hook did to those still counts. The block's
class keeps its forward; ours hands over to it wherever the fused ops would not pay or do not apply (`Site.takes`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType

import torch

from triskele.backend import TABLES, explain, may_pick
from triskele.diffusers.explain import answer
from triskele.diffusers.interface import Adapter, Replaced
from triskele.diffusers.undo import UndoLog
from triskele.ops import adaln_modulate, gate_residual

LEAST_ELEMENTS = 2**19
"""Elements of a block's input from which on the fused ops win on a CPU; below, their calls cost what they save."""

DTYPES = (torch.float32, torch.bfloat16)
FUSED = "one pass each for norm and modulation, gate and residual"


def modulate(norm: torch.nn.LayerNorm, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """norm(x) * (1 + scale) + shift; x [B, L, C], scale and shift [B, C]."""
    return adaln_modulate(x, scale, shift, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def gated(residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """residual + gate * x; gate [B, C]."""
    if x.dtype != residual.dtype:   # a linear that computes in another dtype
        return (residual + gate[:, None] * x).to(residual.dtype)
    return gate_residual(residual, x, gate)


class Site:
    """One block whose forward is ours.

    fused    (block, *arguments of its forward) -> what its forward returns
    devices  device types that have a kernel for both ops
    live     False once restored: somebody's wrapper may still hold on to our forward
    """

    def __init__(self, block: torch.nn.Module, fused: Callable, devices: tuple[str, ...]):
        self.fused, self.devices, self.live = fused, devices, True
        original = type(block).forward

        def forward(module, hidden_states, *args, **kwargs):
            run = self.fused if self.takes(module, hidden_states) else original
            return run(module, hidden_states, *args, **kwargs)

        self.forward = MethodType(forward, block)

    def takes(self, block: torch.nn.Module, x: torch.Tensor) -> bool:
        """Not in training (the backwards have no kernel yet), nor under autocast (which picks dtypes by op)."""
        return (self.live and x.device.type in self.devices and x.dtype in DTYPES and x.numel() >= LEAST_ELEMENTS
                and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
                and getattr(block, "_chunk_size", None) is None)

    def remove(self, block: torch.nn.Module) -> None:
        self.live = False
        if block.__dict__.get("forward") is self.forward:
            del block.__dict__["forward"]


def apply(model: torch.nn.Module, adapter: Adapter, undo: UndoLog) -> list[Replaced]:
    """Give the blocks the adapter's fused forwards; a block that is not as the adapter knows it is left alone."""
    devices = _devices()
    replaced = []
    model = getattr(model, "_orig_mod", model)                # inside the wrapper of torch.compile
    for name, block in model.named_modules() if devices else ():
        entry = adapter.fused_blocks.get(type(block).__name__)
        if entry is None or "forward" in block.__dict__:      # under somebody's hook already
            continue
        fused, fits = entry
        if _arguments(type(block).forward) != _arguments(fused) or not fits(block):
            continue
        site = Site(block, fused, devices)
        undo.call(lambda site=site, block=block: site.remove(block))
        block.__dict__["forward"] = site.forward
        now = f"{FUSED} (from {LEAST_ELEMENTS} elements on, outside training and autocast)"
        replaced.append(Replaced("sampler", name, type(block).__name__, now,
                                 ask=functools.partial(_backend_of, site, block)))
    return replaced


def _backend_of(site: Site, block: torch.nn.Module) -> tuple[str, tuple[str, ...]]:
    """(backend, reasons of those before it) for the block where it stands; "none": its own forward runs."""
    values = next((p for p in block.parameters() if p.is_floating_point() and p.element_size() > 1), None)
    if values is None or values.is_meta:
        return "", ()
    if values.dtype not in DTYPES:
        return "none", (f"fused: takes {' and '.join(map(str, DTYPES))}, got {values.dtype}",)
    norms = [m.normalized_shape[0] for m in block.modules() if isinstance(m, torch.nn.LayerNorm)]
    x = torch.zeros(1, 1, norms[0] if norms else 1, device=values.device, dtype=values.dtype)
    chosen, reasons = answer(explain("adaln.modulate", x, x[:, 0], x[:, 0], None, None, None, 1e-6))
    return (chosen if values.device.type in site.devices else "none"), reasons


def plain_norms(*norms) -> bool:
    """Whether each is a layer norm over the last axis and nothing else."""
    return all(type(norm).__name__ in ("LayerNorm", "FP32LayerNorm") and len(norm.normalized_shape) == 1
               for norm in norms)


def _devices() -> tuple[str, ...]:
    """Device types on which both ops have a kernel that `auto` may pick."""
    def of(op):
        return {b.device_type for b in TABLES[op] if b.name != "reference" and not b.missing() and may_pick(b)}
    return tuple(sorted(of("adaln.modulate") & of("adaln.gate")))


def _arguments(forward: Callable) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
