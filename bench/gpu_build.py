"""Loads the native libraries that were built beforehand, and builds them here where they are missing or stale.

A library is stale where the sources that it says it was built from are not those of this tree. `_C` may be absent: it
belongs to one version of Python and only tells how the libraries were built.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_sources

ROOT = Path(__file__).parent.parent
CHECK = """
import json, sys
from triskele import _native
print(json.dumps({"cpu": _native.cpu_library(), "cuda": _native.cuda_library(), "triton": _native.triton_package()}))
"""


def reasons() -> dict[str, list[str]]:
    """Library -> why it does not load, in a process of its own: a library that is loaded cannot be replaced."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"cpu": [last], "cuda": [last], "triton": [last]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def stale() -> list[str]:
    """What of the CUDA library's sources differs from the tree."""
    built = gpu_sources.built_from()
    if built is None:
        return [f"{gpu_sources.LIBRARY} does not say what it was built from"]
    now = {path: digest for path, digest in gpu_sources.on_disk().items() if path.startswith("csrc/")}
    return sorted(f"{path} has changed since the build" for path in now.keys() | built.keys()
                  if now.get(path) != built.get(path) and _is_cuda(path))


def _is_cuda(path: str) -> bool:
    return path.startswith("csrc/cuda/") or path in gpu_sources.SHARED or path == "csrc/schema.cpp"


def build() -> int:
    """In place. The CPU kernels for every machine alone: here they are needed for the ops' schemas."""
    jobs = os.environ | {"TRISKELE_BUILD_LEVELS": os.environ.get("TRISKELE_BUILD_LEVELS", "base")}
    return subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=jobs).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="say what would be built, and build nothing")
    args = parser.parse_args(arguments)
    found, old = reasons(), stale()
    needed = [*found["cpu"], *found["cuda"], *old]
    record = {"before": found, "stale": old, "built": False, "module_c": importlib.util.find_spec("triskele._C") is not
              None}
    print("\n".join(needed) or "the libraries load, and are of these sources")
    wanted = ["cpu"] if args.dry else ["cpu", "cuda"]
    if needed and not args.dry:
        start = time.perf_counter()
        record["status"] = build()
        record["built"], record["seconds"] = True, time.perf_counter() - start
        found = reasons()
        record["after"], record["stale_after"] = found, stale()
        print(f"built in {record['seconds']:.0f} s, exit status {record['status']}")
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    from triskele.doctor import doctor

    doctor()
    failed = [reason for name in wanted for reason in found[name]]
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
