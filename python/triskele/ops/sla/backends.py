"""Tables of the SLA ops: sla.route, sla.forward, sla.backward."""

from __future__ import annotations

import torch
from torch import Tensor

from triskele._native import cpu_library
from triskele.backend import Backend, register
from triskele.ops.sla import cuda_backend, cuda_backward_backend, cuda_route_backend, reference, triton_backend
from triskele.ops.sla.reference import Settings

native = torch.ops.triskele_native


def _cpu_why_not(q: Tensor, *_rest) -> list[str]:
    return [] if q.dtype in (torch.float32, torch.bfloat16) else [f"takes float32 and bfloat16, got {q.dtype}"]


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _readable(x: Tensor | None) -> Tensor | None:
    """A dtype that the backward's kernel reads, exact where it can be."""
    return x if x is None or x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _codes(settings: Settings) -> tuple[int, int]:
    """The feature map and the scope as the kernels know them."""
    features, scopes = ("softmax", "elu", "relu"), ("all", "complement", "marginal")
    return features.index(settings.feature_map), scopes.index(settings.scope)


def _cpu_route(q, k, n_keep, n_drop, block_q, block_k, keep_keys, key_mask):
    if q.dtype == torch.float16:  # a copy, exact
        q, k = q.float(), k.float()
    return native.sla_route(q, k, n_keep, n_drop, block_q, block_k, _contiguous(keep_keys), _contiguous(key_mask))


def _cpu_forward(q, k, v, block_map, weight, bias, alpha, key_mask, settings: Settings, parts: bool):
    return native.sla_forward(
        q, k, v, block_map.contiguous(), _float32(weight), _float32(bias), _float32(alpha), _contiguous(key_mask),
        settings.block_q, settings.block_k, *_codes(settings), settings.scale, parts)


def _cpu_backward(q, k, v, block_map, o_sparse, _o_linear, lse, d_sparse, d_linear, d_lse, key_mask,
                  settings: Settings):
    return native.sla_backward(
        q, k, v, block_map.contiguous(), o_sparse, lse.contiguous(), _readable(d_sparse), _readable(d_linear),
        _float32(d_lse), _contiguous(key_mask), settings.block_q, settings.block_k, *_codes(settings), settings.scale)


register("sla.route", (
    cuda_route_backend.ROUTE,
    Backend("triton", triton_backend.route, triton_backend.why_not, triton_backend.missing),
    Backend("cpu", _cpu_route, missing=cpu_library),
    Backend("reference", reference.route),
))
register("sla.forward", (
    cuda_backend.FORWARD,
    Backend("triton", triton_backend.forward, triton_backend.why_not, triton_backend.missing),
    Backend("cpu", _cpu_forward, _cpu_why_not, missing=cpu_library),
    Backend("reference", reference.forward),
))
register("sla.backward", (
    cuda_backward_backend.BACKWARD,
    Backend("triton", triton_backend.backward, triton_backend.why_not, triton_backend.missing),
    Backend("cpu", _cpu_backward, _cpu_why_not, missing=cpu_library),
    Backend("reference", reference.backward),
))
