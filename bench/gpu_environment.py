"""What the stages of bench/gpu.sh share: the device's folder, the commit, the package's path, tools under a limit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit_of(machine: dict) -> str:
    """The machine's commit; where the tree came without its history, what TRISKELE_COMMIT says."""
    return machine["commit"] if machine["commit"] != "unknown" else os.environ.get("TRISKELE_COMMIT", "unknown")


def folder_name(device_name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def overlay(folder: Path, root: Path = ROOT) -> Path:
    """A folder for PYTHONPATH in which the `triskele` of the tree `root` is whole without being installed: links to its
    three parts. They come before what an installed tree's finder would say of `triton_kernels` and `assets`."""
    package = folder / "triskele"
    package.mkdir(parents=True, exist_ok=True)
    parts = {part.name: part for part in (*(root / "python" / "triskele").iterdir(), root / "triton_kernels",
                                          root / "assets") if part.name != "__pycache__"}
    for link in package.iterdir():
        if link.is_symlink() and (link.name not in parts or link.resolve() != parts[link.name].resolve()):
            link.unlink()  # what it led to is gone, or is of another tree
    for name, part in parts.items():
        if not (package / name).exists():
            (package / name).symlink_to(part)
    return folder


OUT_OF_TIME = 124
REAPING = 5.0
"""Seconds that a process gets to be gone after SIGKILL: one that is stuck in the driver never is."""


def reap(child: subprocess.Popen, seconds: float = REAPING) -> None:
    """Wait for a child that was killed; where it does not end, that is said, and it is left behind."""
    try:
        child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"process {child.pid} does not end although it was killed; going on without it", flush=True)


@dataclass(frozen=True)
class Ended:
    """Exit status (OUT_OF_TIME where it was stopped), what it printed, seconds until then."""

    status: int
    output: str
    seconds: float


def run_all(commands: dict[str, list[str]], seconds: float, env: dict[str, str] | None = None) -> dict[str, Ended]:
    """The commands side by side; what still runs after `seconds` is stopped with everything that it started.

    Each has a session of its own, since a tool that is killed leaves the program that it watched. Being terminated
    itself, this process takes them along.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start, children, ended = time.monotonic(), {}, {}
    try:
        for name, command in commands.items():
            file = tempfile.TemporaryFile()
            children[name] = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT,
                                              start_new_session=True), file
        while len(ended) < len(children) and time.monotonic() - start < seconds:
            time.sleep(0.05)
            ended |= {name: (child.returncode, time.monotonic() - start) for name, (child, _) in children.items()
                      if name not in ended and child.poll() is not None}
    finally:
        for child, _ in children.values():
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                reap(child)
        signal.signal(signal.SIGTERM, before)
    found = {}
    for name, (_, file) in children.items():
        file.seek(0)
        status, passed = ended.get(name, (OUT_OF_TIME, seconds))
        found[name] = Ended(status, file.read().decode(errors="replace"), passed)
        file.close()
    return found
