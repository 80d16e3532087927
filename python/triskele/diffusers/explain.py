"""Which backend will run an arm's kernel on a device, and why not a better one: the lines of `Handle.summary()`.

A backend's `why_not` may look at every input of its op, so each probe here is a whole call, as the op makes it.
"""

from __future__ import annotations

import torch

from triskele.backend import Choice, explain
from triskele.configs import SLA, VMoBA


def backend_of(config: SLA | VMoBA, device: torch.device, dtype: torch.dtype,
               head_dim: int) -> tuple[str, tuple[str, ...]]:
    """(backend, reasons of those before it) for two blocks of tokens of this device, dtype and head_dim."""
    if device.type == "meta":
        return "", ()  # chosen when the model stands on a device
    op, inputs = (_sla if isinstance(config, SLA) else _vmoba)(config, device, dtype, head_dim)
    return answer(explain(op, *inputs, backend=config.backend))


def answer(choice: Choice) -> tuple[str, tuple[str, ...]]:
    """(backend or "none", reasons of those that come before it)."""
    reasons = []
    for name, why in choice.reasons.items():
        if name == "reference" and choice.chosen is not None:
            continue  # it comes last: not a better one
        reasons += [f"{name}: {reason}" for reason in why]
    return choice.chosen or "none", tuple(reasons)


def _sla(config: SLA, device, dtype, head_dim):
    import triskele.ops  # noqa: F401  enters the tables
    from triskele.ops.sla.reference import Settings

    q = torch.zeros(1, 1, 2 * config.block_q, head_dim, device=device, dtype=dtype)  # one block that holds the whole
    kv = torch.zeros(1, 1, 2 * config.block_k, head_dim, device=device, dtype=dtype)  # sequence may be of any size
    block_map = torch.ones(1, 1, 2, 2, device=device, dtype=torch.int8)
    weight = torch.zeros(head_dim, head_dim, device=device, dtype=dtype) if config.linear == "proj" else None
    alpha = torch.ones(1, 1, q.shape[2], device=device, dtype=dtype) if config.linear == "alpha" else None
    settings = Settings(config.block_q, config.block_k, config.feature_map, config.scope, head_dim**-0.5)
    return "sla.forward", (q, kv, kv, block_map, weight, None, alpha, None, settings, False)


def _vmoba(config: VMoBA, device, dtype, head_dim):
    import triskele.ops  # noqa: F401

    q = torch.zeros(1, 1, 2, head_dim, device=device, dtype=dtype)
    order = torch.arange(2, device=device)
    bounds = torch.tensor([0, 2], device=device, dtype=torch.int32)
    mask = torch.ones(1, 1, 1, 2, device=device, dtype=torch.bool)
    return "vmoba.attention", (q, q, q, order, bounds, mask)
