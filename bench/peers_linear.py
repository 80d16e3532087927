"""What the linear is compared with. A peer that does not run here is named absent, with the reason."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch
from timing import rotating
from torch.nn.functional import linear as torch_linear


def linear(inputs: list[tuple], weight: torch.Tensor, bias: torch.Tensor):
    """torch's float32 and bfloat16 linear (oneDNN or cuBLAS), int8 through torch, torchao, gemlite: (calls, absent)."""
    calls, absent = {}, {}
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        w, b = weight.to(dtype), bias.to(dtype)
        own = [(x.to(dtype),) for (x,) in inputs]
        calls[name] = rotating(lambda x, w=w, b=b: torch_linear(x, w, b), own)
    device = weight.device
    if device.type == "cpu":
        calls |= _onednn(inputs, weight, bias)
    for package, call in (("torchao", _torchao), ("gemlite", _gemlite)):
        if importlib.util.find_spec(package) is None:
            absent[package] = "not importable"
        elif package == "gemlite" and device.type != "cuda":
            absent[package] = "needs a GPU"
        else:
            calls[package] = call(inputs, weight, bias)
    return calls, absent


def _onednn(inputs, weight, bias):
    """oneDNN's int8: the whole dynamic linear (float32 in and out), and the product alone of codes ready made."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig

    plain = torch.nn.Linear(weight.shape[1], weight.shape[0])
    plain.weight.data, plain.bias.data = weight.float(), bias.float()
    plain.qconfig = per_channel_dynamic_qconfig
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():  # torch's quantized tensors are announced to go
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "onednn"
        dynamic = Linear.from_float(plain)
        torch.backends.quantized.engine = engine
    codes, scale = _codes(weight)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    activations = [_codes(x) for (x,) in inputs]
    bias = bias.float()

    def product(x, x_scale):
        return torch.ops.onednn.qlinear_pointwise(x, x_scale, 0, packed, scale, zeros, bias, 1.0, 0, torch.bfloat16,
                                                  "none", [], "")

    return {"oneDNN int8 (W8A8)": rotating(lambda x: dynamic(x), [(x.float(),) for (x,) in inputs]),
            "oneDNN int8, the product alone": rotating(product, [(c, float(s.max())) for c, s in activations])}


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
