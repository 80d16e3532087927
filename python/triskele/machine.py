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


def cpu_features() -> str:
    """The instruction sets that the kernels know of and this CPU has, as one line; "" without the built module."""
    try:
        from triskele import _C
    except ImportError:
        return ""
    return " ".join(_C.cpu_features())


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not installed or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def dirty() -> bool:
    """Whether the source tree that this runs from has changes that are not committed, records and pages aside."""
    left_out = (":(top,exclude)bench/results", ":(top,exclude)docs", ":(top,exclude)README.md")
    return bool(_output("git", "status", "--porcelain", "--", ":(top)", *left_out))


def commit() -> str:
    """The commit of the source tree that this runs from ("+" where it is dirty); "unknown" for a wheel."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    return "unknown" if head is None else head + ("+" if dirty() else "")


def describe() -> dict:
    """A flat dict of strings and numbers, for JSON records. cores: torch's threads."""
    record = {
        "cpu": cpu_name(), "cores": torch.get_num_threads(), "kernel_level": _native.cpu_level(),
        "cpu_features": cpu_features(), "python": platform.python_version(), "torch": torch.__version__,
        "triskele": __version__, "commit": commit(), "dirty": dirty(),
    }
    try:
        import diffusers

        record["diffusers"] = diffusers.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
        record["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return record
