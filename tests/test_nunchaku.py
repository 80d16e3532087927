"""The nunchaku checkpoint layout: byte for byte both ways, hostile files, and such a layer in our op."""

from __future__ import annotations

import math
import time

import pytest
import torch
from conftest import Vectors, vector_files
from tolerance import relative_norm

import triskele as tk
from triskele import quantize
from triskele.quantize import nunchaku

PACKED = vector_files("quant", "pack_*")
OPTIONAL = {"lora_down": "lora_down_logical", "lora_up": "lora_up_logical", "smooth": "smooth_logical",
            "bias": "bias_logical", "tensor_scale": "wtscale_logical"}


@pytest.fixture(params=PACKED, ids=lambda p: p.stem)
def layer(request):
    """(vectors, stored tensors, logical arguments) of one file."""
    v = Vectors(request.param)
    stored = {name.removeprefix("packed."): t for name, t in v.items() if name.startswith("packed.")}
    logical = {name: v[key] for name, key in OPTIONAL.items() if key in v}
    if "smooth" not in logical:  # rank 0: the file leaves it out, the packed one holds ones
        logical["smooth"] = torch.ones(int(v.metadata["in_features"]), dtype=v["weight"].dtype)
    return v, stored, {"codes": v["codes"], "scales": v["wscales_logical"], "format": v.metadata["format"],
                       "dtype": v["weight"].dtype, **logical}


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_pack(layer):
    _, stored, logical = layer
    assert_same_bytes(nunchaku.pack(**logical), stored)


def test_unpack_and_pack_again(layer):
    _, stored, _ = layer
    assert_same_bytes(nunchaku.pack(**nunchaku.unpack(stored)), stored)


def test_unpack_trimmed(layer):
    v, stored, logical = layer
    out = nunchaku.unpack(stored, shape=tuple(v["codes"].shape), rank=int(v.metadata["rank"]))
    assert out.keys() == logical.keys()
    for name, value in logical.items():
        assert torch.equal(out[name], value) if isinstance(value, torch.Tensor) else out[name] == value, name
        assert not isinstance(value, torch.Tensor) or out[name].dtype == value.dtype, name
    assert_same_bytes(nunchaku.pack(**out), stored)


def test_quantized_codes_of_the_files(layer):
    """quantize_weight gives the files' codes and scales, bit for bit (the stacked file has three tensor scales)."""
    v, _, logical = layer
    parts = 3 if "qkv" in v.name else 1
    for i, residual in enumerate(v["residual"].chunk(parts)):
        rows = slice(i * residual.shape[0], (i + 1) * residual.shape[0])
        q = tk.quantize.quantize_weight(residual, logical["format"], dtype=logical["dtype"])
        assert torch.equal(q.codes, v["codes"][rows]) and torch.equal(q.scales, v["wscales_logical"][rows])
        if q.tensor_scale is not None:
            scale = v["wtscale_logical"]
            assert float(q.tensor_scale) == float(scale[rows][0] if parts > 1 else scale[0])


def test_second_naming(layer):
    _, stored, _ = layer
    other = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor"}
    renamed = {other.get(name, name): t for name, t in stored.items()}
    renamed["smooth_factor_orig"] = stored["smooth"]
    assert_same_bytes(nunchaku.pack(**nunchaku.unpack(renamed)), stored)


def test_layer_runs_and_is_written_again(layer):
    v, stored, logical = layer
    shape = tuple(v["codes"].shape)
    weight, bias = nunchaku.load_nunchaku_linear(stored, shape, int(v.metadata["rank"]), activation="none")
    x = torch.randn(9, shape[1])
    y = tk.ops.svdq_linear(x.double(), weight, bias, backend="reference")
    residual = quantize.formats.dequantize(v["codes"], v["wscales_logical"], v.get("wtscale_logical"),
                                           logical["format"], 64 if logical["format"] == "int4" else 16)
    want = x.double() / logical["smooth"].double() @ residual.T + v["bias_logical"].double()
    if "lora_up" in logical:
        want += x.double() @ v["lora_down_logical"].double().T @ v["lora_up_logical"].double().T
    assert relative_norm(y, want) < 1e-12
    assert relative_norm(y, x.double() @ v["weight"].double().T + v["bias_logical"].double()) < 0.25  # 4 bits
    assert_same_bytes(nunchaku.save_nunchaku_linear(weight, bias, logical["dtype"]), stored)
    padded, padded_bias = nunchaku.load_nunchaku_linear(stored)  # without a shape the padded layer runs
    wide = torch.nn.functional.pad(x, (0, padded.in_features - shape[1]))
    full = tk.ops.svdq_linear(wide.double(), padded, padded_bias, backend="reference")
    trimmed, _ = nunchaku.load_nunchaku_linear(stored, shape, int(v.metadata["rank"]))
    assert relative_norm(full[:, :shape[0]], tk.ops.svdq_linear(x.double(), trimmed, bias, backend="reference")) < 1e-12


def test_gelu_shift_lives_in_the_bias():
    x = torch.nn.functional.gelu(torch.randn(50, 128))
    weight = tk.quantize.svd_quantize(torch.randn(128, 128), x, rank=16, activation="int4", dtype=torch.bfloat16,
                                      shift=tk.quantize.GELU_SHIFT)
    bias = torch.randn(128)
    stored = nunchaku.save_nunchaku_linear(weight, bias)
    absorbed = nunchaku.unpack(stored)["bias"].double()
    torch.testing.assert_close(absorbed, bias.double() + weight.shift_bias(), rtol=0.01, atol=0.01)
    again, own = nunchaku.load_nunchaku_linear(stored, activation="int4", shift=tk.quantize.GELU_SHIFT)
    a, b = (tk.ops.svdq_linear(x.double(), w, c, backend="reference") for w, c in ((weight, bias), (again, own)))
    assert float((a - b).abs().max()) < 0.05  # bfloat16 bias


def test_large_layer_is_fast():
    codes = torch.randint(-7, 8, (12288, 3072), dtype=torch.int8)
    scales = torch.rand(12288, 48) + 0.5
    start = time.perf_counter()
    assert torch.equal(nunchaku.unpack(nunchaku.pack(codes, scales))["codes"], codes)
    assert time.perf_counter() - start < 30


def good():
    return nunchaku.pack(torch.randint(-7, 8, (128, 128), dtype=torch.int8), torch.rand(128, 2) + 0.1,
                         torch.randn(16, 128), torch.randn(128, 16), torch.rand(128) + 0.5, torch.randn(128))


def good_nvfp4():
    return nunchaku.pack(torch.randint(0, 8, (128, 128)), torch.rand(128, 8) + 0.1, format="nvfp4",
                         tensor_scale=torch.ones(1))


NAN = torch.full((2, 128), float("nan"), dtype=torch.bfloat16)
HOSTILE = {
    "expected a tensor named qweight": lambda d: d.pop("qweight"),
    "expected a tensor named wscales": lambda d: d.pop("wscales"),
    "lora_down and lora_up, or neither": lambda d: d.pop("lora_up"),
    "names among": lambda d: d.update(surprise=torch.ones(1)),
    "lora_down once": lambda d: d.update(proj_down=d["lora_down"]),
    "qweight: expected a dense tensor with data": lambda d: d.update(qweight="x"),
    "qweight: expected a dense tensor with data, got torch.strided on meta": lambda d: d.update(
        qweight=torch.empty(2**20, 2**20, dtype=torch.int8, device="meta")),
    "qweight: expected dtype torch.int8": lambda d: d.update(qweight=d["qweight"].int()),
    "qweight: expected 2 dimensions": lambda d: d.update(qweight=d["qweight"].flatten()),
    "multiples of 128": lambda d: d.update(qweight=d["qweight"][:100]),
    r"qweight: .*multiples of 128.*\[0, 64\]": lambda d: d.update(qweight=d["qweight"][:0]),
    "wscales: expected 256 elements": lambda d: d.update(wscales=d["wscales"][:1]),
    "wscales dtype: expected one of": lambda d: d.update(wscales=d["wscales"].float()),
    "wscales: expected finite": lambda d: d.update(wscales=NAN),
    "lora_down: expected .* r a multiple of 16": lambda d: d.update(lora_down=d["lora_down"][:, :9]),
    "lora_up: expected 2048 elements": lambda d: d.update(lora_up=torch.zeros(2**14, 16, dtype=torch.bfloat16)),
    "lora_up: expected finite": lambda d: d.update(lora_up=d["lora_up"] / 0),
    "smooth: expected 128 elements": lambda d: d.update(smooth=d["smooth"][:4]),
    "smooth_orig: expected 128 elements": lambda d: d.update(smooth_orig=d["smooth"][:4]),
    "bias: expected 128 elements": lambda d: d.update(bias=d["bias"][:4]),
    "bias dtype: expected torch.bfloat16": lambda d: d.update(bias=d["bias"].half()),
    "lora_up: expected 0 elements": lambda d: d.update(lora_down=d["lora_down"][:0]),
    "bias: expected a dense tensor": lambda d: d.update(bias=d["bias"].to_sparse()),
    "smooth: expected a dense tensor": lambda d: d.update(smooth=d["smooth"].to("meta")),
    "int4 layer: expected no wtscale": lambda d: d.update(wtscale=torch.ones(1, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_files(message):
    d = good()
    HOSTILE[message](d)
    with pytest.raises(ValueError, match=message):
        nunchaku.unpack(d)


HOSTILE_NVFP4 = {
    r"wscales: expected \[G, 128\]": lambda d: d.update(wscales=d["wscales"][:3]),
    r"wscales: expected \[G, 128\], ": lambda d: d.update(wscales=d["wscales"][:0]),
    "wscales: expected finite": lambda d: d.update(wscales=(d["wscales"].float() * math.nan).to(torch.float8_e4m3fn)),
    "scales: expected one for each 16": lambda d: d.update(wscales=d["wscales"][:4]),
    "wtscale or wcscales, got both": lambda d: d.update(wcscales=torch.ones(128, dtype=torch.bfloat16)),
    "wtscale: expected 1 elements": lambda d: d.update(wtscale=torch.ones(7, dtype=torch.bfloat16)),
    "wtscale: expected finite": lambda d: d.update(wtscale=torch.full((1,), math.inf, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("message", HOSTILE_NVFP4)
def test_hostile_nvfp4_files(message):
    d = good_nvfp4()
    HOSTILE_NVFP4[message](d)
    with pytest.raises(ValueError, match=message):
        nunchaku.unpack(d)


@pytest.mark.parametrize("arguments, message", [
    ({"shape": (256, 128)}, r"shape\[0\]: expected an integer in"),
    ({"shape": (128, 2**60)}, r"shape\[1\]: expected an integer in"),
    ({"shape": 128}, r"shape: expected \(N, K\), got 128"), ({"shape": (128, 128, 1)}, r"shape: expected \(N, K\)"),
    ({"rank": 17}, "rank: expected an integer in"), ({"rank": 0}, "rank: expected an integer in"),
    ({"format": "nvfp4"}, "wscales dtype: expected one that fits"),
    ({"format": "int3"}, "format: expected one of")])
def test_bad_unpack_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        nunchaku.unpack(good(), **arguments)
    with pytest.raises(ValueError, match="shape: expected one that pads to"):
        nunchaku.unpack(nunchaku.pack(torch.zeros(256, 128, dtype=torch.int8), torch.ones(256, 2)), shape=(100, 128))
    with pytest.raises(ValueError, match="rank: expected one that pads to 32"):  # 16 would drop factors in silence
        nunchaku.unpack(nunchaku.pack(torch.zeros(128, 128, dtype=torch.int8), torch.ones(128, 2),
                                      torch.ones(20, 128), torch.ones(128, 20)), rank=16)
    with pytest.raises(ValueError, match="checkpoint layer: expected a dict"):
        nunchaku.unpack([1])


@pytest.mark.parametrize("arguments, message", [
    ({"codes": torch.full((128, 128), 9)}, r"codes: expected values in \[-8, 7\]"),
    ({"codes": torch.zeros(128, 128)}, "codes: expected an integer dtype"),
    ({"codes": torch.zeros(0, 128, dtype=torch.int8)}, "codes: expected at least one row"),
    ({"codes": torch.full((128, 128), -1), "format": "nvfp4"}, r"codes: expected values in \[0, 15\]"),
    ({"scales": torch.ones(128, 3)}, "scales: expected shape"),
    ({"scales": torch.ones(128, 3), "format": "nvfp4"}, "scales: expected shape"),
    ({"scales": torch.full((128, 2), math.nan)}, "scales in torch.bfloat16: expected finite"),
    ({"scales": torch.full((128, 2), 1e6), "dtype": torch.float16}, "scales in torch.float16: expected finite"),
    ({"scales": torch.full((128, 8), 449.0), "format": "nvfp4"}, "at most 448"),
    ({"scales": torch.full((128, 8), math.inf), "format": "nvfp4"}, "at most 448"),
    ({"codes": torch.zeros(128, 128, dtype=torch.int8, device="meta")}, "codes: expected a tensor with data"),
    ({"dtype": torch.float32}, "dtype: expected one of"), ({"format": "int3"}, "format: expected one of"),
    ({"lora_down": torch.ones(4, 128)}, "both or neither"),
    ({"lora_down": torch.ones(4, 128), "lora_up": torch.ones(128, 5)}, "lora_up: expected shape"),
    ({"lora_down": torch.ones(4, 100), "lora_up": torch.ones(128, 4)}, "lora_down: expected shape"),
    ({"smooth": torch.ones(3)}, "smooth: expected shape"), ({"bias": torch.ones(3)}, "bias: expected shape"),
    ({"tensor_scale": torch.ones(1)}, "tensor_scale with format='int4'"),
    ({"tensor_scale": torch.ones(3), "format": "nvfp4", "scales": torch.ones(128, 8)}, "tensor_scale: expected shape")])
def test_bad_pack_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        nunchaku.pack(**{"codes": torch.zeros(128, 128, dtype=torch.int8), "scales": torch.ones(128, 2), **arguments})
