"""Scores so large that one key takes all the weight, which a float64 product tells apart from rounding."""

from __future__ import annotations

import math

import torch

ROUNDING = 1e-5
"""Of a float32 product, relative to a row's largest score, generously."""


def clear_rows(q, k, seen, scale):
    """([B, H, L] bool: the best visible key leads by more than rounding and e^-40; its index)."""
    scores = (q.double() @ k.double().nan_to_num().mT * scale).masked_fill(~seen, -math.inf)
    widest = scores.masked_fill(~seen, 0).abs().amax(-1, keepdim=True)
    best = scores.amax(-1, keepdim=True)
    rivals = (scores > best - 40 - ROUNDING * widest).sum(-1)
    return (rivals == 1) & seen.any(-1), scores.argmax(-1)


def assert_one_key_each(o, q, k, v, seen, scale) -> int:
    """Rows that clearly see one key are its value, all rows are finite; the number of clear ones."""
    assert o.isfinite().all(), "not finite"
    clear, index = clear_rows(q, k, seen, scale)
    want = v.double().nan_to_num(0, 0, 0).gather(2, index[..., None].expand(*o.shape))
    error = (o.double() - want).abs().amax(-1)[clear]
    allowed = 8 * torch.finfo(o.dtype).eps * want.abs().amax(-1)[clear]
    assert (error <= allowed).all(), f"{int((error > allowed).sum())} rows are not their key's value"
    return int(clear.sum())
