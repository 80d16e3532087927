"""SLA and VMoBA where scores reach 2^31 and far beyond: no weight may pass what exp2 holds."""

from __future__ import annotations

import pytest
import torch
from large_scores import assert_one_key_each

from triskele.ops import route_blocks, sparse_linear_attention, vmoba_attention, vmoba_select

TOKENS = 150


def _inputs(dtype, magnitude, dim):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, TOKENS, dim, generator=g) for _ in range(3))
    return [x.to(dtype).requires_grad_() for x in (q * magnitude, k * magnitude, v)]


def _check(o, leaves, seen):
    q, k, v = (x.detach() for x in leaves)
    assert assert_one_key_each(o.detach(), q, k, v, seen, q.shape[3] ** -0.5) > 0.9 * seen.shape[1] * TOKENS
    for grad in torch.autograd.grad(o.float().sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dim", [48, 64])      # 1 / sqrt(D): rounded, and a power of two
@pytest.mark.parametrize("magnitude", [300, 3e4, 1e5, 1e6, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_key_takes_all_against_float64(dtype, magnitude, dim):
    leaves = _inputs(dtype, magnitude, dim)
    q, k, v = leaves
    block_map = route_blocks(q.detach(), k.detach(), keep=0.4, block_q=16, block_k=32)
    seen = (block_map == 1).repeat_interleave(16, 2)[:, :, :TOKENS].repeat_interleave(32, 3)[..., :TOKENS]
    for scope in ("all", "complement", "marginal"):
        parts = sparse_linear_attention(q, k, v, block_map, block_q=16, block_k=32, scope=scope, return_parts=True,
                                        proj_weight=torch.zeros(dim, dim, dtype=dtype))
        _check(parts[1], leaves, seen)
    mask = vmoba_select(q, k, chunk=40, top_k=2)
    chunk = torch.arange(TOKENS) // 40
    _check(vmoba_attention(q, k, v, chunk=40, mask=mask), leaves,
           mask.permute(0, 2, 3, 1)[..., chunk] | (chunk[:, None] == chunk))
