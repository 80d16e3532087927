"""Runs a measurement to its end although a kernel may hang or take its process along.

    python bench/gpu_supervise.py --partial FILE --seconds 150 --silence 75 SCRIPT ARGUMENTS...

The script keeps FILE up to date: what it has measured, and as "running" what it is about to. Where it ends with `LOST`
or by a signal, or FILE does not change for `silence` seconds, it is started again with --resume, which leaves the
running step out, with that for its error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu_environment import OUT_OF_TIME, reap

LOST = 86
"""Exit status of a process whose CUDA context does not answer any more."""
LOST_ERROR = "its process was lost: a kernel hung, or left an error that no later call survives"
STARTS = 10


def context_is_lost(device) -> bool:
    """Whether an earlier kernel's error now meets every call to this torch.device."""
    if device.type != "cuda":
        return False
    import torch  # here: the supervisor itself has no use for it

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Progress:
    """A record on its way: rewritten before and after each step, in FILE, so that another process can go on."""

    def __init__(self, path: Path | None, fresh: Callable[[], dict], resume: bool):
        self.path = path
        old = resume and path is not None and path.exists()
        self.record = json.loads(path.read_text()) if old else fresh()
        self.interrupted = self.record.pop("running", None)

    def begin(self, name: str) -> None:
        self.record["running"] = name
        self.write()

    def done(self) -> None:
        self.record.pop("running", None)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writing = self.path.with_suffix(".writing")
            writing.write_text(json.dumps(self.record, indent=1) + "\n")
            writing.replace(self.path)

    def finish(self, out: Path) -> None:
        self.done()
        self.path.replace(out)


def _once(command: list[str], partial: Path, seconds: float, silence: float) -> int | None:
    """Exit status; None where it was silent for too long, OUT_OF_TIME where the time was up."""
    child = subprocess.Popen([sys.executable, *command])  # in this stage's session: stopped with it
    start = time.time()
    try:
        while child.poll() is None:
            now = time.time()
            heard = max(start, partial.stat().st_mtime if partial.exists() else 0.0)
            if now - start > seconds:
                return OUT_OF_TIME
            if now - heard > silence:
                return None
            time.sleep(0.1)
        return child.returncode
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            reap(child)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partial", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--silence", type=float, default=75.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    args.partial.unlink(missing_ok=True)
    end, lost = time.monotonic() + args.seconds, False
    for _ in range(STARTS):
        status = _once([*args.command, *(["--resume"] if lost else [])], args.partial, end - time.monotonic(),
                       args.silence)
        if status is not None and status != LOST and status >= 0:
            return max(status, 1) if lost else status
        lost = True
        print(f"its process was lost ({'silent' if status is None else status}); going on behind the case", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
