"""The custom ops triskele::sla_route, sla_attention and sla_backward: shapes in tracing, autograd, choice of backend.

`sla_attention` returns (o, o_sparse, o_linear, lse); the two parts are empty unless `parts`. Autograd needs them where
the linear branch takes part, so the public function asks for them then. The gradients of the projection and of alpha,
and the way from do to the gradients of the parts, are plain torch; q, k and v go through `sla_backward`, which has a
table of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triskele.backend import select
from triskele.ops.sla import backends  # noqa: F401  enters the tables
from triskele.ops.sla.reference import Settings


def _fitting(block: int, x: Tensor) -> int:
    """A block that is longer than the sequence is the whole sequence; the backends need not handle (or pad to) more."""
    return min(block, max(1, x.shape[2]))


@torch.library.custom_op("triskele::sla_route", mutates_args=())
def sla_route(q: Tensor, k: Tensor, n_keep: int, n_drop: int, block_q: int, block_k: int, keep_keys: Tensor | None,
              key_mask: Tensor | None, backend: str) -> Tensor:
    inputs = (q, k, n_keep, n_drop, _fitting(block_q, q), _fitting(block_k, k), keep_keys, key_mask)
    return select("sla.route", *inputs, backend=backend).run(*inputs)


@sla_route.register_fake
def _(q, k, n_keep, n_drop, block_q, block_k, keep_keys, key_mask, backend):
    blocks = (q.shape[2] + block_q - 1) // block_q, (k.shape[2] + block_k - 1) // block_k
    return q.new_empty((*q.shape[:2], *blocks), dtype=torch.int8)


@torch.library.custom_op("triskele::sla_attention", mutates_args=())
def sla_attention(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, proj_weight: Tensor | None,
                  proj_bias: Tensor | None, alpha: Tensor | None, key_mask: Tensor | None, block_q: int, block_k: int,
                  feature_map: str, scope: str, scale: float, parts: bool,
                  backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (q, k, v, block_map, proj_weight, proj_bias, alpha, key_mask,
              Settings(_fitting(block_q, q), _fitting(block_k, k), feature_map, scope, scale), parts)
    return select("sla.forward", *inputs, backend=backend).run(*inputs)


@sla_attention.register_fake
def _(q, k, v, block_map, proj_weight, proj_bias, alpha, key_mask, block_q, block_k, feature_map, scope, scale, parts,
      backend):
    part = q.shape if parts else (0,)
    return (q.new_empty(q.shape), q.new_empty(part), q.new_empty(part), q.new_empty(q.shape[:3], dtype=torch.float32))


@torch.library.custom_op("triskele::sla_backward", mutates_args=())
def sla_backward(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, o_sparse: Tensor, o_linear: Tensor | None,
                 lse: Tensor, d_sparse: Tensor, d_linear: Tensor | None, d_lse: Tensor | None, key_mask: Tensor | None,
                 block_q: int, block_k: int, feature_map: str, scope: str, scale: float,
                 backend: str) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (q, k, v, block_map, o_sparse, o_linear, lse, d_sparse, d_linear, d_lse, key_mask,
              Settings(_fitting(block_q, q), _fitting(block_k, k), feature_map, scope, scale))
    return select("sla.backward", *inputs, backend=backend).run(*inputs)


@sla_backward.register_fake
def _(q, k, v, block_map, o_sparse, o_linear, lse, d_sparse, d_linear, d_lse, key_mask, block_q, block_k, feature_map,
      scope, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, block_map, weight, bias, alpha, key_mask, *settings, parts, backend = inputs
    o, o_sparse, o_linear, lse = output
    has_linear = weight is not None or alpha is not None
    if has_linear and not parts:
        raise RuntimeError("triskele::sla_attention: expected parts=True where a linear branch takes part and a "
                           "gradient is wanted, got parts=False")
    ctx.save_for_backward(q, k, v, block_map, o_sparse if parts else o, o_linear if parts else None, lse, weight, alpha,
                          key_mask)
    ctx.settings, ctx.parts, ctx.backend = (*settings,), parts, backend
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _backward(ctx, do, do_sparse, do_linear, d_lse):
    q, k, v, block_map, o_sparse, o_linear, lse, weight, alpha, key_mask = ctx.saved_tensors
    wide = torch.promote_types(q.dtype, torch.float32)  # of the arithmetic here
    d_sparse, d_linear = (None if g is None or not ctx.parts else g.to(wide) for g in (do_sparse, do_linear))
    d_weight = d_bias = d_alpha = None
    if do is not None:
        do = do.to(wide)
        if alpha is not None:
            mix = alpha.to(wide)[..., None]
            d_sparse, d_linear = _sum(mix * do, d_sparse), _sum((1 - mix) * do, d_linear)
            if ctx.needs_input_grad[6]:
                d_alpha = (do * (o_sparse.to(wide) - o_linear.to(wide))).sum(-1).to(alpha.dtype)
        else:
            d_sparse = _sum(do, d_sparse)
        if weight is not None:
            d_linear = _sum(do @ weight.to(wide), d_linear)
            if ctx.needs_input_grad[4]:
                d_weight = (do.flatten(0, 2).mT @ o_linear.to(wide).flatten(0, 2)).to(weight.dtype)
            if ctx.needs_input_grad[5]:
                d_bias = do.sum((0, 1, 2)).to(ctx.bias_dtype)
    dq = dk = dv = None
    if any(ctx.needs_input_grad[:3]) and any(g is not None for g in (d_sparse, d_linear, d_lse)):
        if d_sparse is None:
            d_sparse = torch.zeros_like(q, dtype=wide)
        dq, dk, dv = sla_backward(q, k, v, block_map, o_sparse, o_linear if d_linear is not None else None, lse,
                                  d_sparse, d_linear, d_lse, key_mask, *ctx.settings, ctx.backend)
    return (dq, dk, dv, None, d_weight, d_bias, d_alpha, *[None] * 8)


sla_attention.register_autograd(_backward, setup_context=_setup_context)
