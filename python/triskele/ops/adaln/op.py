"""triskele::adaln_modulate, triskele::gate_residual and their backwards: custom ops with fake kernels and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from triskele.backend import select
from triskele.checks import expected
from triskele.ops.adaln import backends  # noqa: F401  registers the tables


def _check_range(index: Tensor | None, rows: int) -> None:
    """Here, not in api.py: values cannot be looked at while tracing, nor on a GPU without waiting for it."""
    if index is not None and index.device.type == "cpu" and index.numel():
        low, high = index.aminmax()
        if low < 0 or high >= rows:
            raise expected("row_index", f"values in [0, {rows})", f"{int(low)} to {int(high)}")


@torch.library.custom_op("triskele::adaln_modulate", mutates_args=())
def adaln_modulate(x: Tensor, scale: Tensor, shift: Tensor, row_index: Tensor | None, weight: Tensor | None,
                   bias: Tensor | None, eps: float, backend: str) -> Tensor:
    _check_range(row_index, scale.shape[0])
    inputs = (x, scale, shift, row_index, weight, bias, eps)
    return select("adaln.modulate", *inputs, backend=backend).run(*inputs)


@adaln_modulate.register_fake
def _(x, scale, shift, row_index, weight, bias, eps, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("triskele::adaln_modulate_backward", mutates_args=())
def adaln_modulate_backward(grad: Tensor, x: Tensor, scale: Tensor, row_index: Tensor | None, weight: Tensor | None,
                            bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, shift (in the dtype of scale), weight and bias (empty where there is none)."""
    inputs = (grad, x, scale, row_index, weight, bias, eps)
    return tuple(select("adaln.modulate_backward", *inputs).run(*inputs))


@adaln_modulate_backward.register_fake
def _(grad, x, scale, row_index, weight, bias, eps):
    def vector(value):
        return x.new_empty(0) if value is None else torch.empty_like(value, memory_format=torch.contiguous_format)
    return (x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape), vector(weight),
            vector(bias))


def _modulate_context(ctx, inputs, output):
    x, scale, shift, row_index, weight, bias, eps, _ = inputs
    ctx.save_for_backward(x, scale, row_index, weight, bias)
    ctx.eps, ctx.shift_dtype = eps, shift.dtype


def _modulate_grad(ctx, grad):
    x, scale, row_index, weight, bias = ctx.saved_tensors
    dx, dscale, dshift, dweight, dbias = adaln_modulate_backward(grad, x, scale, row_index, weight, bias, ctx.eps)
    return (dx, dscale, dshift.to(ctx.shift_dtype), None, None if weight is None else dweight,
            None if bias is None else dbias, None, None)


adaln_modulate.register_autograd(_modulate_grad, setup_context=_modulate_context)


@torch.library.custom_op("triskele::gate_residual", mutates_args=())
def gate_residual(residual: Tensor, x: Tensor, gate: Tensor, row_index: Tensor | None, backend: str) -> Tensor:
    _check_range(row_index, gate.shape[0])
    inputs = (residual, x, gate, row_index)
    return select("adaln.gate", *inputs, backend=backend).run(*inputs)


@gate_residual.register_fake
def _(residual, x, gate, row_index, backend):
    return residual.new_empty(residual.shape)


@torch.library.custom_op("triskele::gate_residual_backward", mutates_args=())
def gate_residual_backward(grad: Tensor, x: Tensor, gate: Tensor, row_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate; that of residual is grad itself."""
    inputs = (grad, x, gate, row_index)
    return tuple(select("adaln.gate_backward", *inputs).run(*inputs))


@gate_residual_backward.register_fake
def _(grad, x, gate, row_index):
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _gate_context(ctx, inputs, output):
    _, x, gate, row_index, _ = inputs
    ctx.save_for_backward(x, gate, row_index)


def _gate_grad(ctx, grad):
    dx, dgate = gate_residual_backward(grad, *ctx.saved_tensors)
    return grad, dx, dgate, None, None


gate_residual.register_autograd(_gate_grad, setup_context=_gate_context)
