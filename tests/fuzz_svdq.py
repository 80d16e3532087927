"""Fuzz cases of the 4-bit linear."""

from __future__ import annotations

import torch
from fuzz_draw import Draw
from tolerance import assert_within_budget

from triskele.ops import svdq_linear
from triskele.ops.svdq import reference
from triskele.quantize import SVDQWeight
from triskele.quantize.formats import fake_quantize_activation


def _weight(draw: Draw, n: int, k: int) -> SVDQWeight:
    """Any codes and scales: what a file may hold, not only what the quantizer makes."""
    format = draw.choice("format", ("int4", "nvfp4"))
    group = 16 if format == "nvfp4" else draw.choice("group", (16, 32, 64, 64, 128))
    groups, rank = -(-k // group), draw.random.choice((0, 1, 4, 15, 16, 17, 32, 40))
    draw.facts["rank"] = rank
    narrow = draw.choice("parameters", (torch.float32, torch.bfloat16))
    scales = draw.values(n, groups).abs() * 0.1 + 0.01
    tensor_scale = None
    if format == "nvfp4":
        scales = scales.clamp(max=400).float().to(torch.float8_e4m3fn)
        tensor_scale = draw.values(draw.random.choice((1, n))).abs().float() * 0.01 + 1e-3
    return SVDQWeight(
        draw.integers("qweight", 0, 255, n, groups * group // 2, dtype=torch.uint8),
        scales if format == "nvfp4" else scales.to(narrow), draw.tensor("lora_down", rank, k, dtype=narrow, scale=0.1),
        draw.tensor("lora_up", n, rank, dtype=narrow, scale=0.1), draw.values(k).abs().to(narrow) + 0.2, k, format,
        "int8", tensor_scale, draw.choice("shift", (0.0, 0.0, 0.171875)))


def linear(draw: Draw) -> None:
    dtype = draw.choice("dtype", (torch.float32, torch.bfloat16, torch.float16))
    m, k, n = draw.size("M", 140, low=0), draw.size("K", draw.random.choice((64, 300, 900))), draw.size("N", 300)
    weight = _weight(draw, n, k)
    lead = draw.random.choice([(m,), (1, m), (2, m)])
    x = draw.tensor("x", *lead, k, dtype=dtype, expand=False)
    if m and draw.flag("odd tokens", 0.15):
        x[..., 0, :] = 0
        x[..., -1, draw.random.randrange(k)] = draw.choice("odd", (float("nan"), float("inf")))
    bias = draw.tensor("bias", n, dtype=draw.random.choice((dtype, torch.float32))) if draw.flag("has bias") else None
    epilogue = draw.choice("epilogue", tuple(reference.EPILOGUES))
    got = svdq_linear(x, weight, bias, backend="cpu", epilogue=epilogue)
    truth = svdq_linear(x.double(), weight, bias, backend="reference", epilogue=epilogue)
    assert got.dtype == dtype and got.shape == truth.shape
    given = 0.0 if bias is None else bias.double()
    given = (given + weight.shift_bias() if weight.shift else given)
    z = fake_quantize_activation(reference.smoothed(x, weight.smooth, weight.shift), "int8", False, torch.float32)
    down = x.float() @ weight.lora_down.float().T
    rough = z @ weight.dequantize().float().T + down @ weight.lora_up.float().T
    rough = reference.activated(rough + torch.as_tensor(given).float(), epilogue).to(dtype)
    finite = truth.isfinite()
    assert torch.equal(got.isnan(), truth.isnan()), "NaN in other tokens"
    # the sizes of what is added up: a sum may cancel to less
    terms = z.abs() @ weight.dequantize().float().abs().T + down.abs() @ weight.lora_up.float().abs().T
    terms = terms + torch.as_tensor(given).abs().float()
    largest = float(terms[finite].max()) if bool(finite.any()) else 0.0
    floor = 8 * torch.finfo(torch.float32).eps * largest
    floor += torch.finfo(dtype).eps * (float(truth[finite].abs().max()) if bool(finite.any()) else 0.0)
    assert_within_budget(got[finite], truth[finite], rough[finite], what="y", floor=floor)


CASES = {"svdq.linear": linear}
