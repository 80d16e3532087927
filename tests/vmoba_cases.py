"""What the VMoBA tests share: the modes, inputs, the chunk of each token, and attention over an explicit mask."""

from __future__ import annotations

import math

import torch

MODES = [("topk", "query"), ("topk", "head"), ("topk", "all"),
         ("threshold", "query"), ("threshold", "block"), ("threshold", "head"), ("threshold", "all")]
BACKENDS = ("reference", "cpu")


def draw(*shape, count=3, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def chunk_of(chunk, length):
    """The chunk of each token, from the definition."""
    if isinstance(chunk, int):
        return torch.arange(length) // chunk
    out = torch.empty(length, dtype=torch.int64)
    for c, (begin, end) in enumerate(zip(chunk.bounds[:-1].tolist(), chunk.bounds[1:].tolist())):
        out[chunk.order[begin:end]] = c
    return out


def dense(q, k, v, mask, chunk):
    """Attention over an explicit [B, H, S, S] mask, in the inputs' precision; differentiable."""
    where = chunk_of(chunk, q.shape[2])
    seen = mask.permute(0, 2, 3, 1)[..., where] | (where[:, None] == where)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def with_gradients(fn, tensors, upstream):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = fn(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]
