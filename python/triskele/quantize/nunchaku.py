"""The weight layout of nunchaku checkpoints, both ways, byte for byte.

N and K are padded to 128 and the rank to 16; codes and factors with zeros, scales, smooth and bias with ones. Each
layout is one view of the padded tensor with its axes permuted, so packing is a copy. The axes, outermost first:

    qweight      n = T a s l (128, 16, 8, 1), k = t h c e (64, 32, 8, 1)  ->  T t a l c s h e, nibble e of a 32-bit word
    scales int4  n = T a b c d (128, 16, 8, 2, 1), g                      ->  T g a c b d; bias, smooth, wcscales: one g
    scales nvfp4 n = T s f e (128, 32, 8, 1), g = t q (4, 1)              ->  T t e f s q
    factors      i = I s l (16, 8, 1), j = J h q e (16, 8, 2, 1)          ->  tiles of 256: l q s h e
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from triskele.checks import check_choice, check_int, check_shape, check_tensor, expected
from triskele.quantize.formats import E4M3_MAX, FORMATS, pack_nibbles, pad_columns, unpack_nibbles
from triskele.quantize.weight import SVDQWeight

_DTYPES = (torch.float16, torch.bfloat16)
_GROUP = {"int4": 64, "nvfp4": 16}
_SECOND_NAMING = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth",
                  "smooth_factor_orig": "smooth_orig"}
_NAMES = ("qweight", "wscales", "lora_down", "lora_up", "smooth", "smooth_orig", "bias", "wtscale", "wcscales")


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(tensor: torch.Tensor, rows: int, columns: int | None = None, value: float = 0) -> torch.Tensor:
    if columns is None:
        return F.pad(tensor, (0, rows - tensor.shape[0]), value=value)
    return F.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]), value=value)


# Layouts. `_to_x` takes the padded logical tensor; `_from_x` takes the stored one back to it.

def _to_qweight(codes):  # [N', K'] -> int8 [N', K'/2]
    n, k = codes.shape
    words = codes.view(n // 128, 8, 2, 8, k // 64, 2, 4, 8).permute(0, 4, 1, 3, 6, 2, 5, 7)
    return pack_nibbles(words).reshape(n, k // 2).view(torch.int8)


def _from_qweight(qweight, format):
    n, k = qweight.shape[0], qweight.shape[1] * 2
    words = unpack_nibbles(qweight.contiguous().view(torch.uint8), format).view(n // 128, k // 64, 8, 8, 4, 2, 2, 8)
    return words.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k)


def _to_scales(scales):  # [N', G] -> [G, N']
    n, g = scales.shape
    return scales.view(n // 128, 8, 2, 4, 2, g).permute(0, 5, 1, 3, 2, 4).reshape(g, n)


def _from_scales(stored):
    g, n = stored.shape
    return stored.reshape(n // 128, g, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, g)


def _to_scales_nvfp4(scales):  # [N', G], G in fours -> [G, N']
    n, g = scales.shape
    return scales.view(n // 128, 4, 4, 8, g // 4, 4).permute(0, 4, 3, 2, 1, 5).reshape(g, n)


def _from_scales_nvfp4(stored):
    g, n = stored.shape
    return stored.reshape(n // 128, g // 4, 8, 4, 4, 4).permute(0, 4, 3, 2, 1, 5).reshape(n, g)


def _to_vector(values):  # [N'] -> [N']
    return _to_scales(values[:, None]).reshape(-1)


def _from_vector(stored):
    return _from_scales(stored[None]).reshape(-1)


def _to_lora_up(up):  # [N', r'] -> [N', r']
    n, r = up.shape
    return up.view(n // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6).reshape(n, r)


def _from_lora_up(stored):
    n, r = stored.shape
    return stored.reshape(n // 16, r // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6).reshape(n, r)


def _to_lora_down(down):  # [r', K'] -> [K', r']
    r, k = down.shape
    return down.view(r // 16, 2, 8, k // 16, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(k, r)


def _from_lora_down(stored):
    k, r = stored.shape
    return stored.reshape(k // 16, r // 16, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6).reshape(r, k)


def _check_finite(name, tensor):
    if not bool(torch.isfinite(tensor.float()).all()):
        raise expected(name, "finite values", "NaN or infinity")


def _check_zero_beyond(codes, groups):
    """The published packer pads nvfp4 scales to 4 groups, codes to 128 columns: those without a scale must be zero."""
    if bool((codes[:, 16 * groups:] & 7).any()):
        raise expected("scales", f"one for each 16 of the {codes.shape[1]} columns", f"{groups} groups")


def _stored(name, tensor, shape, dtype):
    """An argument of `pack` in the dtype of the file, its shape and values checked."""
    check_tensor(name, tensor, floating=True)
    check_shape(name, tensor, shape)
    stored = tensor.to(dtype)
    _check_finite(f"{name} in {dtype}", stored)
    return stored


def pack(codes, scales, lora_down=None, lora_up=None, smooth=None, bias=None, format="int4", dtype=torch.bfloat16,
         tensor_scale=None) -> dict[str, torch.Tensor]:
    """Logical tensors of one layer -> the tensors of a nunchaku checkpoint.

    codes         [N, K]: int4 -8 … 7, or e2m1 codes 0 … 15 for nvfp4
    scales        [N, ceil(K / 64)] for int4, [N, ceil(K / 16)] for nvfp4 (or as padded: codes beyond are 0)
    lora_down     [r, K], applies to x as it is; lora_up [N, r]; both or neither, of one rank
    smooth, bias  [K], [N]
    dtype         of everything but codes and nvfp4 scales: float16 or bfloat16
    tensor_scale  nvfp4: [1] gives `wtscale`, [N] gives `wcscales`; None is one

    Raises ValueError for shapes that do not fit, codes out of range, and values that are not finite in `dtype`.
    """
    check_choice("format", format, FORMATS)
    check_choice("dtype", dtype, _DTYPES)
    check_tensor("codes", codes, dim=2)
    if codes.is_meta:
        raise expected("codes", "a tensor with data", "one on the meta device")
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise expected("codes", "an integer dtype", codes.dtype)
    n, k = codes.shape
    if n == 0 or k == 0:
        raise expected("codes", "at least one row and one column", list(codes.shape))
    low, high = (-8, 7) if format == "int4" else (0, 15)
    if int(codes.min()) < low or int(codes.max()) > high:
        raise expected("codes", f"values in [{low}, {high}]", f"[{int(codes.min())}, {int(codes.max())}]")
    rows, columns = _up(n, 128), _up(k, 128)
    packed = {"qweight": _to_qweight(_pad(codes.to(torch.int8), rows, columns))}
    check_tensor("scales", scales, dim=2, floating=True)
    if format == "int4":
        stored = _stored("scales", scales, (n, -(-k // 64)), dtype)
        packed["wscales"] = _to_scales(_pad(stored, rows, columns // 64, 1))
    else:
        given = scales.shape[1]
        if given != -(-k // 16) and (given % 4 or not columns - 128 < 16 * given <= columns):
            raise expected("scales", f"shape [{n}, {-(-k // 16)}]", list(scales.shape))
        _check_zero_beyond(codes, given)
        if not bool((scales.float().abs() <= E4M3_MAX).all()):  # the cast would make 448 of infinity
            raise expected("scales with format='nvfp4'", f"values of at most {E4M3_MAX:g}", "larger ones or NaN")
        stored = _stored("scales", scales, (n, None), torch.float8_e4m3fn).float()  # F.pad knows no float8
        padded = _pad(stored, rows, _up(given, 4), 1).to(torch.float8_e4m3fn)
        packed["wscales"] = _to_scales_nvfp4(padded)
    if (lora_down is None) != (lora_up is None):
        raise expected("lora_down and lora_up", "both or neither", "one of them")
    if lora_down is not None:
        down, up = _stored("lora_down", lora_down, (None, k), dtype), _stored("lora_up", lora_up, (n, None), dtype)
        if down.shape[0] != up.shape[1]:
            raise expected("lora_up", f"shape [{n}, {down.shape[0]}]", list(up.shape))
        if rank := _up(down.shape[0], 16):
            packed["lora_down"] = _to_lora_down(_pad(down, rank, columns))
            packed["lora_up"] = _to_lora_up(_pad(up, rows, rank))
    if smooth is not None:
        packed["smooth"] = _to_vector(_pad(_stored("smooth", smooth, (k,), dtype), columns, value=1))
    if bias is not None:
        packed["bias"] = _to_vector(_pad(_stored("bias", bias, (n,), dtype), rows, value=1))
    if format == "int4":
        if tensor_scale is not None:
            raise expected("tensor_scale with format='int4'", None, type(tensor_scale).__name__)
    elif tensor_scale is None:
        packed["wtscale"] = torch.ones(1, dtype=dtype, device=codes.device)
    else:
        check_tensor("tensor_scale", tensor_scale, floating=True)
        flat = tensor_scale.reshape(-1)
        if flat.shape[0] == 1:
            packed["wtscale"] = _stored("tensor_scale", flat, (1,), dtype)
        else:
            packed["wcscales"] = _to_vector(_pad(_stored("tensor_scale", flat, (n,), dtype), rows, value=1))
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _what(value) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.layout} on {value.device}"


def _named(d) -> dict[str, torch.Tensor]:
    """The tensors under the names of the first naming; both namings are read."""
    if not hasattr(d, "items"):
        raise expected("checkpoint layer", "a dict of tensors", type(d).__name__)
    out = {}
    for key, tensor in d.items():
        name = _SECOND_NAMING.get(key, key)
        if name not in _NAMES:
            raise expected("checkpoint layer", f"names among {(*_NAMES, *_SECOND_NAMING)}", repr(key))
        if name in out:
            raise expected("checkpoint layer", f"{name} once", "it under both of its names")
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise expected(name, "a dense tensor with data", _what(tensor))
        out[name] = tensor
    for name in ("qweight", "wscales"):
        if name not in out:
            raise expected("checkpoint layer", f"a tensor named {name}", sorted(map(str, d)))
    return out


def _float16(name, tensor, shape):
    """A 16-bit float tensor of the file, its dtype, size and values checked. Shapes are nominal: the order is flat."""
    check_choice(f"{name} dtype", tensor.dtype, _DTYPES)
    want = 1
    for size in shape:
        want *= size
    if tensor.numel() != want:
        raise expected(name, f"{want} elements ({list(shape)})", f"{tensor.numel()} ({list(tensor.shape)})")
    _check_finite(name, tensor)
    return tensor.reshape(shape)


def unpack(d, shape=None, rank=None, format=None) -> dict:
    """The tensors of a nunchaku checkpoint layer -> `pack`'s arguments: `pack(**unpack(d))` is d again.

    d       qweight, wscales and those of lora_down, lora_up, smooth, bias, wtscale, wcscales that are there, or the
            second naming's proj_down, proj_up, smooth_factor. smooth_orig is checked and left out
    shape   (N, K) to trim to; None keeps the padded sizes. rank: likewise for the factors
    format  None reads it off wscales' dtype; given, it must agree

    Returns codes, scales (float32), format, dtype, and lora_down, lora_up, smooth, bias, tensor_scale where they are.
    Raises ValueError before any use for missing or unknown names, wrong dtypes or sizes, and values not finite.
    """
    d = _named(d)
    found = "nvfp4" if d["wscales"].dtype == torch.float8_e4m3fn else "int4"
    if format is not None:
        check_choice("format", format, FORMATS)
        if format != found:
            raise expected("wscales dtype", f"one that fits format={format!r}", d["wscales"].dtype)
    qweight = d["qweight"]
    if qweight.dtype not in (torch.int8, torch.uint8):
        raise expected("qweight", "dtype torch.int8", qweight.dtype)
    check_tensor("qweight", qweight, dim=2)
    rows, columns = qweight.shape[0], qweight.shape[1] * 2
    if rows == 0 or columns == 0 or rows % 128 or columns % 128:
        raise expected("qweight", "shape [N, K/2] with N and K multiples of 128", list(qweight.shape))
    if shape is not None and (not isinstance(shape, (tuple, list)) or len(shape) != 2):
        raise expected("shape", "(N, K)", shape)
    n, k = (rows, columns) if shape is None else shape
    check_int("shape[0]", n, low=1, high=rows)
    check_int("shape[1]", k, low=1, high=columns)
    if _up(n, 128) != rows or _up(k, 128) != columns:
        raise expected("shape", f"one that pads to ({rows}, {columns})", (n, k))

    if found == "int4":
        stored = _float16("wscales", d["wscales"], (columns // 64, rows))
        scales, dtype, groups = _from_scales(stored), stored.dtype, -(-k // 64)
    else:
        stored = d["wscales"]
        groups = stored.numel() // rows
        if stored.numel() % (4 * rows) or not columns - 128 < 16 * groups <= columns:
            raise expected("wscales", f"[G, {rows}], G in fours, {columns // 16} or the fewer that K needs",
                           list(stored.shape))
        _check_finite("wscales", stored)
        scales, dtype = _from_scales_nvfp4(stored.reshape(groups, rows)), None
        groups = groups if shape is None else min(groups, -(-k // 16))
    codes = _from_qweight(qweight, found)[:n, :k]
    if found == "nvfp4":
        _check_zero_beyond(codes, groups)
    out = {"codes": codes, "scales": scales[:n, :groups].float(), "format": found}

    if ("lora_down" in d) != ("lora_up" in d):
        raise expected("checkpoint layer", "lora_down and lora_up, or neither", "one of them")
    if "lora_down" in d and (d["lora_down"].numel() or d["lora_up"].numel()):
        padded = d["lora_down"].numel() // columns
        if padded % 16:
            raise expected("lora_down", f"[{columns}, r] with r a multiple of 16", list(d["lora_down"].shape))
        down = _from_lora_down(_float16("lora_down", d["lora_down"], (columns, padded)))
        up = _from_lora_up(_float16("lora_up", d["lora_up"], (rows, padded)))
        rank = padded if rank is None else rank
        check_int("rank", rank, low=1, high=padded)
        if _up(rank, 16) != padded:
            raise expected("rank", f"one that pads to {padded}", rank)
        out["lora_down"], out["lora_up"] = down[:rank, :k], up[:n, :rank]
    elif rank:
        raise expected("rank", "0: the layer has no factors", rank)
    if "smooth_orig" in d:
        _float16("smooth_orig", d["smooth_orig"], (columns,))
    if "smooth" in d:
        out["smooth"] = _from_vector(_float16("smooth", d["smooth"], (columns,)))[:k]
    if "bias" in d:
        out["bias"] = _from_vector(_float16("bias", d["bias"], (rows,)))[:n]
    if found == "int4" and ("wtscale" in d or "wcscales" in d):
        raise expected("int4 layer", "no wtscale and no wcscales", sorted(d))
    if "wtscale" in d and "wcscales" in d:
        raise expected("nvfp4 layer", "wtscale or wcscales", "both")
    if "wtscale" in d:
        out["tensor_scale"] = _float16("wtscale", d["wtscale"], (1,)).float()
    elif "wcscales" in d:
        out["tensor_scale"] = _from_vector(_float16("wcscales", d["wcscales"], (rows,)))[:n].float()
    for name in ("wtscale", "wcscales", "lora_down", "smooth", "bias"):
        dtype = dtype or (d[name].dtype if name in d else None)
    for name in ("wtscale", "wcscales", "lora_down", "lora_up", "smooth", "bias"):
        if name in d and d[name].dtype != dtype:
            raise expected(f"{name} dtype", dtype, d[name].dtype)
    out["dtype"] = dtype or torch.bfloat16
    return {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in out.items()}


def load_nunchaku_linear(d, shape=None, rank=None, activation="int8", shift=0.0):
    """A nunchaku checkpoint layer -> (SVDQWeight, bias or None), which `svdq_linear` and `SVDQuantLinear` run.

    shift: 0.171875 for a layer that follows GELU, whose bias in the file has absorbed it; the file does not say. The
    bias returned is the layer's own: `svdq_linear` absorbs the shift again.
    """
    a = unpack(d, shape, rank)
    n, k = a["codes"].shape
    group = _GROUP[a["format"]]
    dtype, device = a["dtype"], a["codes"].device
    need = -(-k // group)
    scales = _pad(a["scales"], n, max(need, a["scales"].shape[1]), 1)[:, :need]
    if a["format"] == "int4":
        scales, tensor_scale = scales.to(dtype), None
    else:
        scales, tensor_scale = scales.to(torch.float8_e4m3fn), a.get("tensor_scale", torch.ones(1, device=device))
    missing = torch.zeros(0, k, dtype=dtype, device=device), torch.zeros(n, 0, dtype=dtype, device=device)
    weight = SVDQWeight(
        pack_nibbles(pad_columns(a["codes"], group)), scales, a.get("lora_down", missing[0]),
        a.get("lora_up", missing[1]), a.get("smooth", torch.ones(k, dtype=dtype, device=device)), k, a["format"],
        activation, tensor_scale, shift)
    bias = a.get("bias")
    if bias is not None and shift:
        bias = (bias.double() - weight.shift_bias()).to(dtype)
    return weight, bias


def save_nunchaku_linear(weight: SVDQWeight, bias=None, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Inverse of `load_nunchaku_linear`; the shift goes into the bias. int4 weights must have groups of 64."""
    if weight.group != _GROUP[weight.format]:
        raise expected("weight.group", _GROUP[weight.format], weight.group)
    if weight.shift:
        bias = weight.shift_bias() + (0 if bias is None else bias.detach().double())
    factors = {"lora_down": weight.lora_down, "lora_up": weight.lora_up} if weight.rank else {}
    return pack(weight.codes, weight.scales, smooth=weight.smooth, bias=None if bias is None else bias.detach(),
                format=weight.format, dtype=dtype, tensor_scale=weight.wtscale, **factors)
