"""Offsets beyond 2^31 elements in every kernel that reads strides: the CPU's, and the CUDA ones in the emulator.

Those of the 4-bit linear and of the solver's step take dense tensors alone: their ops copy any other.
"""

from __future__ import annotations

import emulated
import pytest
import torch
from far import Far

from triskele.ops import (
    adaln_modulate,
    gate_residual,
    route_blocks,
    sparse_linear_attention,
    vmoba_attention,
    vmoba_partition,
    vmoba_select,
)

TOKENS, DIM = 48, 16
BLOCKS = dict(block_q=16, block_k=16)


def _placed(*tensors, axis=-2):
    """The same values, far apart."""
    place = Far()
    far = [place.place(x, axis) for x in tensors]
    for x, y in zip(tensors, far):
        assert torch.equal(x, y) and y.storage_offset() == 0 and y.stride(axis) * (y.shape[axis] - 1) > 2**32
    return far


def _qkv():
    return [torch.randn(2, 2, TOKENS, DIM) for _ in range(3)]


def _forward_and_gradients(run, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))]


@pytest.mark.parametrize("axis", [-2, 0, 1], ids=["tokens", "batch", "heads"])
def test_sparse_linear_attention(axis):
    near = _qkv()
    far = _placed(*near, axis=axis)
    block_map = route_blocks(*near[:2], keep=0.4, **BLOCKS)
    assert torch.equal(route_blocks(*far[:2], keep=0.4, **BLOCKS), block_map)
    weight = torch.randn(DIM, DIM)
    for dtype in (torch.float32, torch.bfloat16):
        def run(*x, dtype=dtype):
            return sparse_linear_attention(*x, block_map, proj_weight=weight.to(dtype), **BLOCKS)
        want = _forward_and_gradients(run, *(x.to(dtype) for x in near))
        if dtype == torch.bfloat16:
            far = _placed(*(x.to(dtype) for x in near), axis=axis)
        for a, b in zip(_forward_and_gradients(run, *far), want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [-2, 0, 1], ids=["tokens", "batch", "heads"])
def test_vmoba(axis):
    near = _qkv()
    far = _placed(*near, axis=axis)
    for chunk in (10, vmoba_partition((3, 4, 4), 2)):
        mask = vmoba_select(*near[:2], chunk=chunk, top_k=2)
        assert torch.equal(vmoba_select(*far[:2], chunk=chunk, top_k=2), mask)

        def run(*x, chunk=chunk, mask=mask):
            return vmoba_attention(*x, chunk=chunk, mask=mask)
        for a, b in zip(_forward_and_gradients(run, *far), _forward_and_gradients(run, *near)):
            assert torch.equal(a, b)


def test_adaln():
    near = [torch.randn(2, TOKENS, DIM) for _ in range(2)]
    far = _placed(*near)
    row = torch.randn(2, DIM)
    assert torch.equal(adaln_modulate(far[0], row, -row), adaln_modulate(near[0], row, -row))
    assert torch.equal(gate_residual(*far, row), gate_residual(*near, row))


def test_adaln_in_the_emulator():
    ops = emulated.load("adaln_sm80")
    near = [torch.randn(2, 3, DIM) for _ in range(2)]
    far = _placed(*near)
    row = torch.randn(2, DIM)
    assert torch.equal(ops.adaln_modulate(far[0], row, -row, None, None, None, 1e-6),
                       ops.adaln_modulate(near[0], row, -row, None, None, None, 1e-6))
    assert torch.equal(ops.adaln_gate(*far, row, None), ops.adaln_gate(*near, row, None))
