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


def overlay(folder: Path) -> Path:
    """A folder for PYTHONPATH in which `triskele` is whole without being installed: links to the tree's three parts."""
    package = folder / "triskele"
    package.mkdir(parents=True, exist_ok=True)
    parts = [*(ROOT / "python" / "triskele").iterdir(), ROOT / "triton_kernels", ROOT / "assets"]
    for link in package.iterdir():
        if not link.exists():  # what it led to is gone
            link.unlink()
    for part in parts:
        link = package / part.name
        if part.name != "__pycache__" and not link.exists():
            link.symlink_to(part)
    return folder


OUT_OF_TIME = 124


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
                child.wait()
        signal.signal(signal.SIGTERM, before)
    found = {}
    for name, (_, file) in children.items():
        file.seek(0)
        status, passed = ended.get(name, (OUT_OF_TIME, seconds))
        found[name] = Ended(status, file.read().decode(errors="replace"), passed)
        file.close()
    return found
