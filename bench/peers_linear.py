"""What the linear is compared with. A peer that does not run here is named absent, with the reason."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch
from case import set_up
from timing import rotating
from torch.nn.functional import linear as torch_linear


def linear(inputs: list[tuple], weight: torch.Tensor, bias: torch.Tensor):
    """torch's float32 and bfloat16 linear (oneDNN or cuBLAS), int8 through torch, torchao, gemlite: (calls, absent)."""
    calls, absent = {}, {}
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        w, b = weight.to(dtype), bias.to(dtype)
        own = [(x.to(dtype),) for (x,) in inputs]
        calls[name] = rotating(lambda x, w=w, b=b: torch_linear(x, w, b), own)
    if weight.device.type == "cpu":
        set_up("oneDNN int8 (W8A8)", lambda: _onednn(inputs, weight, bias), calls, absent)
        set_up("oneDNN int8, the product alone", lambda: _onednn_product(inputs, weight, bias), calls, absent)
    packages(inputs, weight, bias, calls, absent)
    return calls, absent


def packages(inputs: list[tuple], weight: torch.Tensor, bias: torch.Tensor, calls: dict, absent: dict) -> None:
    """Add torchao and gemlite, or why they are absent."""
    for name, make in (("torchao", _torchao), ("gemlite", _gemlite)):
        if importlib.util.find_spec(name) is None:
            absent[name] = "not importable"
        elif name == "gemlite" and weight.device.type != "cuda":
            absent[name] = "needs a GPU"
        else:
            set_up(name, lambda make=make: make(inputs, weight, bias), calls, absent)


def _onednn(inputs, weight, bias):
    """The whole dynamic linear, float32 in and out."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig

    plain = torch.nn.Linear(weight.shape[1], weight.shape[0])
    plain.weight.data, plain.bias.data = weight.float(), bias.float()
    plain.qconfig = per_channel_dynamic_qconfig
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():  # torch's quantized tensors are announced to go
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "onednn"
        try:
            dynamic = Linear.from_float(plain)
        finally:
            torch.backends.quantized.engine = engine
    return rotating(lambda x: dynamic(x), [(x.float(),) for (x,) in inputs])


def _onednn_product(inputs, weight, bias):
    """The int8 product alone, of codes ready made."""
    codes, scale = _codes(weight)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    activations = [_codes(x) for (x,) in inputs]
    bias = bias.float()

    def product(x, x_scale):
        return torch.ops.onednn.qlinear_pointwise(x, x_scale, 0, packed, scale, zeros, bias, 1.0, 0, torch.bfloat16,
                                                  "none", [], "")

    return rotating(product, [(c, float(s.max())) for c, s in activations])


def _codes(x):
    """int8 codes and a scale a row."""
    scale = x.float().abs().amax(1) / 127
    return (x.float() / scale[:, None]).round().to(torch.int8), scale


def _torchao(inputs, weight, bias):
    quantization = importlib.import_module("torchao.quantization")
    dtype = inputs[0][0].dtype
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=dtype))
    model[0].weight.data, model[0].bias.data = weight.to(dtype), bias.to(dtype)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model)
    return rotating(lambda x: compiled(x), inputs)


def _gemlite(inputs, weight, bias):
    helper = importlib.import_module("gemlite.helper")
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=torch.float16)
    layer.weight.data, layer.bias.data = weight.half(), bias.half()
    fast = helper.A8W8_int8_dynamic(device=weight.device).from_linear(layer)
    return rotating(lambda x: fast(x), [(x.half(),) for (x,) in inputs])
