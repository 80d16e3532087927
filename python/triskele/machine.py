"""What a record says of where it was made: hardware, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from triskele import __version__, _native


def cpu_name() -> str:
    """The processor's name as the kernel reports it; the architecture where it does not."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree that this runs from ("+" with uncommitted changes); "unknown" for a wheel."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno", "--", "."], cwd=root, capture_output=True,
                               text=True)
    except FileNotFoundError:
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def describe() -> dict:
    """A flat dict of strings and numbers, for JSON records."""
    record = {
        "cpu": cpu_name(), "cores": torch.get_num_threads(), "kernel_level": _native.cpu_level(),
        "python": platform.python_version(), "torch": torch.__version__, "triskele": __version__, "commit": commit(),
    }
    try:
        import diffusers

        record["diffusers"] = diffusers.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record
