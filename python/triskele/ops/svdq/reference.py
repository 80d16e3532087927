"""The truth: float64, with quantization decided in float32 exactly as the kernels decide it.

    z = (x + shift) * (1 / smooth)            in float32, 1 / smooth rounded to float32 first
    codes, scales = quantize(z)               triskele.quantize.formats says how, for each kind of activation
    y = (codes * scales) R^T + (x lora_down^T) lora_up^T + bias,  R = code * scale of the weight; then the epilogue
"""

from __future__ import annotations

import torch

from triskele.quantize.formats import dequantize, fake_quantize_activation, unpack_nibbles

EPILOGUES = {"none": None, "gelu": "none", "gelu_tanh": "tanh"}
"""What may follow the linear -> torch's name of that GELU's form; csrc/cpu/svdq_gelu.h counts them in this order."""


def weight_float64(qweight, wscales, wtscale, in_features: int, format: str) -> torch.Tensor:
    """R: float64 [N, K]."""
    group = qweight.shape[1] * 2 // wscales.shape[1]
    codes = unpack_nibbles(qweight, format)
    return dequantize(codes, wscales.double(), wtscale, format, group)[:, :in_features]


def smoothed(x, smooth, shift: float) -> torch.Tensor:
    """z [M, K] float32."""
    return (x.float() + shift) * (1.0 / smooth.float())


def activated(y: torch.Tensor, epilogue: str) -> torch.Tensor:
    return y if epilogue == "none" else torch.nn.functional.gelu(y, approximate=EPILOGUES[epilogue])


def svdq_linear(x, qweight, wscales, wtscale, lora_down, lora_up, smooth, bias, format: str, activation: str,
                shift: float, epilogue: str = "none") -> torch.Tensor:
    """x [M, K] -> y [M, N] in x's dtype."""
    residual = weight_float64(qweight, wscales, wtscale, x.shape[1], format)
    if activation == "none":
        quantized = (x.double() + shift) / smooth.double()
    else:
        quantized = fake_quantize_activation(smoothed(x, smooth, shift), activation, unsigned=shift > 0)
    y = quantized @ residual.T + (x.double() @ lora_down.double().T) @ lora_up.double().T
    if bias is not None:
        y = y + bias.double()
    return activated(y, epilogue).to(x.dtype)


def svdq_linear_backward(grad, qweight, wscales, wtscale, lora_down, lora_up, smooth, format: str) -> torch.Tensor:
    """dx = (dy R) / smooth + (dy lora_up) lora_down: straight through the activation's quantization. grad [M, N]."""
    residual = weight_float64(qweight, wscales, wtscale, smooth.shape[0], format)
    dy = grad.double()
    dx = (dy @ residual) / smooth.double() + (dy @ lora_up.double()) @ lora_down.double()
    return dx.to(grad.dtype)
