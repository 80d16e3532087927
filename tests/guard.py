"""Tensors that end, or begin, at an inaccessible page: a read or write past them, by one element, is a fault.

The sanitizers see what the compiler sees; the masked loads and stores of AVX-512 and the tiles of AMX they do not. The
hardware sees them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NONE, _PAGE = 0, mmap.PAGESIZE


def guarded(x: torch.Tensor, side: str = "end", alignment: int = 1) -> torch.Tensor:
    """The same values and strides; the last element (side "end") or the first ("start") touches an inaccessible page.

    alignment: the address is a multiple of it if that of x is, so that a few bytes may lie before the page.
    Elements between the strides, and those up to the far page, are NaN (or the dtype's largest).
    """
    if side not in ("start", "end"):
        raise ValueError(f"side: expected 'start' or 'end', got {side!r}")
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    size = extent * x.element_size()
    room = -(-max(size, 1) // _PAGE) * _PAGE
    pages = mmap.mmap(-1, room + 2 * _PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for page in (base, base + _PAGE + room):
        if _libc.mprotect(page, _PAGE, _NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    poison = torch.frombuffer(pages, dtype=torch.uint8, offset=_PAGE, count=room)
    # NaN in every floating dtype of 2, 4 and 8 bytes; the largest in unsigned ones
    poison.fill_(1 if x.dtype == torch.bool else 0xFF)
    offset = _PAGE if side == "start" else _PAGE + room - size
    if extent and x.data_ptr() % alignment == 0:
        offset -= offset % alignment
    if extent == 0:
        nothing = torch.frombuffer(pages, dtype=torch.uint8, offset=offset - (side == "end"), count=1)[:0]
        return nothing.view(x.dtype).as_strided(x.shape, x.stride())
    flat = torch.frombuffer(pages, dtype=x.dtype, offset=offset, count=extent)
    placed = flat.as_strided(x.shape, x.stride())
    flat.as_strided(*_unique(x)).copy_(x.as_strided(*_unique(x)))
    return placed


def _unique(x: torch.Tensor):
    """Shape and strides of x without its repetitions."""
    return [1 if s == 0 else n for n, s in zip(x.shape, x.stride())], list(x.stride())


def _fence(on: int) -> None:
    """Raises or lowers the fence around new allocations, where tests/fence.c is loaded."""
    if hasattr(_libc, "fence"):
        _libc.fence(on)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).as_strided([x.numel()], [1]).view(torch.uint8)


def _native_ops() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith("triskele_native::")})


def _place(value, side: str, alignment: int, placed: list):
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        placed.append((value, guarded(value, side, alignment)))
        return placed[-1][1]
    if isinstance(value, (list, tuple)):
        return [_place(v, side, alignment, placed) for v in value]
    return value


def guarded_op(name: str, op, side: str, alignment: int = 1):
    """`op` on guarded copies of its tensors. They are compared with the originals afterwards: a kernel does not write
    to its inputs."""

    def call(*arguments):
        placed = []
        arguments = [_place(a, side, alignment, placed) for a in arguments]
        _fence(1)
        try:
            out = op(*arguments)
        finally:
            _fence(0)
        for before, after in placed:
            assert torch.equal(_bytes(before), _bytes(after)), f"{name} wrote to its input {list(before.shape)}"
        return out

    return call


@contextlib.contextmanager
def guarded_arguments(side: str):
    """Inside, every native op is a `guarded_op`; side "none": none is."""
    if side == "none":
        yield
        return
    from triskele import _native

    if reasons := _native.cpu_library():
        raise RuntimeError("; ".join(reasons))
    native = torch.ops.triskele_native
    real = {name: getattr(native, name) for name in _native_ops()}
    for name, op in real.items():
        setattr(native, name, guarded_op(name, op, side))
    try:
        yield
    finally:
        for name, op in real.items():
            setattr(native, name, op)
