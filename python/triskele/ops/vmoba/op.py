"""The custom ops of VMoBA: triskele::vmoba_select, vmoba_attention and its backward."""

from __future__ import annotations

import torch

from triskele import backend as backends_
from triskele.ops.vmoba import backends as _tables  # noqa: F401  registers the tables


@torch.library.custom_op("triskele::vmoba_select", mutates_args=())
def vmoba_select(
    q: torch.Tensor, k: torch.Tensor, order: torch.Tensor | None, bounds: torch.Tensor,
    mode: str, pool: str, top_k: int, threshold: float, backend: str,
) -> torch.Tensor:
    args = (q, k, order, bounds, mode, pool, top_k, threshold)
    return backends_.select("vmoba.select", *args, backend=backend).run(*args)


@vmoba_select.register_fake
def _(q, k, order, bounds, mode, pool, top_k, threshold, backend):
    return q.new_empty(q.shape[0], bounds.shape[0] - 1, q.shape[1], q.shape[2], dtype=torch.bool)


@torch.library.custom_op("triskele::vmoba_attention", mutates_args=())
def vmoba_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor | None, bounds: torch.Tensor,
    mask: torch.Tensor, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    args = (q, k, v, order, bounds, mask)
    return backends_.select("vmoba.attention", *args, backend=backend).run(*args)


@vmoba_attention.register_fake
def _(q, k, v, order, bounds, mask, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("triskele::vmoba_attention_backward", mutates_args=())
def vmoba_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    order: torch.Tensor | None, bounds: torch.Tensor, mask: torch.Tensor, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args = (grad, q, k, v, out, lse, order, bounds, mask)
    return backends_.select("vmoba.attention_backward", *args, backend=backend).run(*args)


@vmoba_attention_backward.register_fake
def _(grad, q, k, v, out, lse, order, bounds, mask, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, order, bounds, mask, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, order, bounds, mask)


def _backward(ctx, grad_out, _grad_lse):
    q, k, v, out, lse, order, bounds, mask = ctx.saved_tensors
    grads = torch.ops.triskele.vmoba_attention_backward(grad_out, q, k, v, out, lse, order, bounds, mask, ctx.backend)
    return *grads, None, None, None, None


vmoba_attention.register_autograd(_backward, setup_context=_setup_context)
