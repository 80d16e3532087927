"""The public linear of the SVDQuant arm."""

from __future__ import annotations

import torch

from triskele.backend import NAMES
from triskele.checks import check_choice, check_same, check_shape, check_tensor, expected
from triskele.ops.svdq.op import svdq_linear_op
from triskele.ops.svdq.reference import EPILOGUES
from triskele.quantize.weight import SVDQWeight


def svdq_linear(x: torch.Tensor, weight: SVDQWeight, bias: torch.Tensor | None = None,
                backend: str = "auto", *, epilogue: str = "none") -> torch.Tensor:
    """y = act(quant(x / smooth) R^T + (x lora_down^T) lora_up^T + bias).

    x        [..., K], floating; any leading dimensions, also of size zero
    weight   SVDQWeight (triskele.quantize.svd_quantize); its `activation` says how x / smooth is quantized: "int8" per
             token, "int4" per token and group of 64, "fp8" per token, "none". Its `shift` is added to x before that,
             and taken back out of the bias here
    bias     [N]
    backend  "auto", "cuda" (float16, bfloat16; int8 activations on sm_90, int4 on sm_80 … sm_89), "triton" (int8 or
             none), "cpu" (int8 activations; float32, bfloat16, float16), "reference" (float64, every case)
    epilogue act: "none", "gelu" (by erf) or "gelu_tanh", as torch.nn.functional.gelu; the CPU kernel applies it in
             float32 before it rounds y, the CUDA and Triton backends to the rounded y

    Returns [..., N] in x's dtype. Differentiable in x (straight through the quantization: the gradient is that of the
    dequantized weight) and in bias; the weight's tensors are constants. A token whose values are all zero (below 1e-30)
    gives zeros before the bias; one with NaN or infinity gives NaN. A token's result does not depend on its batch.

    Raises ValueError for shapes, dtypes or devices that do not fit; NotImplementedError where no backend takes them.
    Source: arXiv 2411.05007, section 4.
    """
    if not isinstance(weight, SVDQWeight):
        raise expected("weight", "an SVDQWeight", type(weight).__name__)
    check_tensor("x", x, floating=True)
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise expected("x", f"shape [..., {weight.in_features}]", list(x.shape))
    check_same("weight", weight.qweight, x, "x", dtype=False)
    check_choice("backend", backend, ("auto", *NAMES))
    check_choice("epilogue", epilogue, tuple(EPILOGUES))
    if bias is not None:
        check_tensor("bias", bias, floating=True)
        check_shape("bias", bias, (weight.shape[0],))
        check_same("bias", bias, x, "x", dtype=False)
    if weight.shift:
        absorbed = weight.shift_bias()
        bias = absorbed if bias is None else bias.double() + absorbed
    return svdq_linear_op(x, weight.qweight, weight.wscales, weight.wtscale, weight.lora_down, weight.lora_up,
                          weight.smooth, bias, weight.format, weight.activation, weight.shift, epilogue, backend)
