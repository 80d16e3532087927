"""torch custom ops `triskele::svdq_linear` and its backward: plain tensors in, backend chosen inside the body."""

from __future__ import annotations

import torch
from torch import Tensor

from triskele.backend import select
from triskele.ops.svdq.backends import OP_OF_ACTIVATION
from triskele.ops.svdq.reference import EPILOGUES


@torch.library.custom_op("triskele::svdq_linear", mutates_args=())
def svdq_linear_op(x: Tensor, qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, lora_down: Tensor,
                   lora_up: Tensor, smooth: Tensor, bias: Tensor | None, format: str, activation: str, shift: float,
                   epilogue: str, backend: str) -> Tensor:
    """x [..., K] -> y [..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    inputs = (rows, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format, activation, shift, epilogue)
    y = select(OP_OF_ACTIVATION[activation], *inputs, backend=backend).run(*inputs)
    return y.reshape(*x.shape[:-1], qweight.shape[0])


@svdq_linear_op.register_fake
def _(x, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format, activation, shift, epilogue, backend):
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.custom_op("triskele::svdq_linear_backward", mutates_args=())
def svdq_linear_backward_op(grad: Tensor, qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, lora_down: Tensor,
                            lora_up: Tensor, smooth: Tensor, format: str) -> Tensor:
    """grad [..., N] -> dx [..., K]."""
    inputs = (grad.reshape(-1, grad.shape[-1]), qweight, wscales, wtscale, lora_down, lora_up, smooth, format)
    dx = select("svdq.backward", *inputs).run(*inputs)
    return dx.reshape(*grad.shape[:-1], smooth.shape[0])


@svdq_linear_backward_op.register_fake
def _(grad, qweight, wscales, wtscale, lora_down, lora_up, smooth, format):
    return grad.new_empty(*grad.shape[:-1], smooth.shape[0])


def _setup_context(ctx, inputs, output):
    x, *weight, bias, ctx.format, ctx.activation, ctx.shift, ctx.epilogue, ctx.backend = inputs
    again = () if ctx.epilogue == "none" else (x, bias)  # what GELU's slope needs: y without it, computed once more
    ctx.save_for_backward(*weight, *again)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    dx = dbias = None
    saved = ctx.saved_tensors  # once: checkpointing lets go of what has been read
    weight, again = saved[:6], saved[6:]
    if again:
        x, bias = again
        flat = svdq_linear_op(x, *weight, bias, ctx.format, ctx.activation, ctx.shift, "none", ctx.backend)
        grad = torch.ops.aten.gelu_backward(grad, flat, approximate=EPILOGUES[ctx.epilogue])
    if ctx.needs_input_grad[0]:
        dx = svdq_linear_backward_op(grad, *weight, ctx.format)
    if ctx.needs_input_grad[7]:
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, None, None, None, None, dbias, None, None, None, None, None


svdq_linear_op.register_autograd(_backward, setup_context=_setup_context)
