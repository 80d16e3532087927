"""Tensors whose elements lie further apart than 2^31 elements, in address space that is reserved but never filled."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

BYTES = 48 << 30
_NORESERVE = 0x4000  # Linux: pages cost nothing until they are written


class Far:
    """A place for such tensors; skips the test where the system refuses the mapping."""

    def __init__(self):
        try:
            self._map = mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        except OSError as error:
            pytest.skip(f"the system refuses to reserve {BYTES >> 30} GB of address space: {error}")
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._used = 0

    def place(self, x: torch.Tensor, axis: int = -2) -> torch.Tensor:
        """x with 2.2 * 2^31 elements between the first and the last index of `axis`, the other axes close together."""
        steps = max(1, x.shape[axis] - 1)
        far = -(-int(2.2 * 2**31) // steps // 64) * 64
        strides, near = [0] * x.dim(), 1
        for i in reversed(range(x.dim())):
            if i != axis % x.dim():
                strides[i], near = near, near * x.shape[i]
        strides[axis] = far
        assert near <= far
        size = (steps * far + near) * x.element_size()
        assert self._used + size <= BYTES, "no room left"
        storage = torch.frombuffer(self._map, dtype=x.dtype, offset=self._used, count=size // x.element_size())
        self._used += -(-near * x.element_size() // 4096) * 4096    # the next one lies between this one's elements
        placed = storage.as_strided(x.shape, strides)
        placed.copy_(x)
        return placed
