"""Loads libtriskele_cpu.so and libtriskele_cuda.so, or says why they are not there.

The libraries register raw ops under `torch.ops.triskele_native`; nothing but the `backends.py` tables calls those.
TRISKELE_NATIVE_DIR names another folder to load them from: a build with sanitizers, say.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

_FOLDER = Path(os.environ.get("TRISKELE_NATIVE_DIR") or Path(__file__).parent)
_BUILD = "build it with `pip install --no-build-isolation -e .` in the source tree (needs a C++ compiler)"


@functools.cache
def cpu_library() -> list[str]:
    """Load the CPU library once. Returns the reasons why it cannot be used; empty when it can."""
    path = _FOLDER / "libtriskele_cpu.so"
    if not path.exists():
        return [f"{path.name} is missing from the installed package: {_BUILD}"]
    try:
        torch.ops.load_library(str(path))
        torch.ops.triskele_native.cpu_level()  # throws where TRISKELE_CPU_LEVEL names no level of this CPU
    except (OSError, RuntimeError) as error:
        return [f"{path.name} does not load: {error}"]
    return []


@functools.cache
def cuda_library() -> list[str]:
    """Load the CUDA library once (its ops' schemas are in the CPU library). Reasons as in `cpu_library`."""
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    path = _FOLDER / "libtriskele_cuda.so"
    if not path.exists():
        return [f"{path.name} is missing from the installed package: nvcc was not found when it was built; {_BUILD}"]
    if reasons := cpu_library():
        return reasons
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return [f"{path.name} does not load: {error}"]
    return []


def _chip() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def cuda_sm80() -> list[str]:
    """Reasons why the CUDA kernels of *_sm80.cu cannot run here: they need sm_80 or later."""
    if reasons := cuda_library():
        return reasons
    major, minor = _chip()
    return [] if major >= 8 else [f"needs compute capability 8.0 or later, got {major}.{minor}"]


def cuda_sm90() -> list[str]:
    """Reasons why the CUDA kernels of *_sm90.cu cannot run here: their instructions are sm_90's alone."""
    if reasons := cuda_library():
        return reasons
    major, minor = _chip()
    return [] if (major, minor) == (9, 0) else [f"needs compute capability 9.0, got {major}.{minor}"]


@functools.cache
def triton_package() -> list[str]:
    """Reasons why Triton kernels cannot run here; empty when they can."""
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return [f"triton does not import: {error}"]
    major, minor = _chip()
    return [] if major >= 8 else [f"needs compute capability 8.0 or later, got {major}.{minor}"]


def cpu_level() -> str | None:
    """The instruction-set level chosen at load time ("base", "avx2", "avx512", "avx512_bf16", "amx"; on Arm "base",
    "dotprod"); None without the library."""
    return None if cpu_library() else torch.ops.triskele_native.cpu_level()
