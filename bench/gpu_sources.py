"""Which sources a GPU backend is made of, as one hash: a record verifies the kernels it ran and no others.

A file counts for a family unless its name begins with another family's: what nobody's name claims, all share.

    cuda    csrc/check.h and csrc/cuda/, as the library says that it was built from them
    triton  triton_kernels/, as they lie on disk
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from triskele import ops  # noqa: F401  the tables register themselves on import
from triskele.backend import TABLES

ROOT = Path(__file__).parent.parent
LIBRARY = "libtriskele_cuda.so"
SHARED = ("csrc/check.h",)


def families() -> list[str]:
    return sorted({op.split(".")[0] for op in TABLES})


def gpu_backends() -> list[tuple[str, str]]:
    """(op, backend) of every GPU entry of the tables."""
    return [(op, entry.name) for op, table in sorted(TABLES.items()) for entry in table if entry.device_type == "cuda"]


def on_disk() -> dict[str, str]:
    """Path from the root -> SHA-256, of every file that may matter."""
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "triton_kernels").rglob("*.py")]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(files) if path.is_file()}


def built_from(library: str = LIBRARY) -> dict[str, str] | None:
    """Path -> SHA-256 of the sources that the library was built from; None where it does not say."""
    path = ROOT / "python" / "triskele" / "built_from.json"
    return json.loads(path.read_text()).get(library) if path.exists() else None


def _counts(path: str, family: str, backend: str) -> bool:
    if backend == "cuda" and path in SHARED:
        return True
    folder = {"cuda": "csrc/cuda/", "triton": "triton_kernels/"}[backend]
    claimed = [other for other in families() if Path(path).name.startswith(other)]
    return path.startswith(folder) and claimed in ([], [family])


def fingerprint(op: str, backend: str, files: dict[str, str] | None) -> str | None:
    """One hash of what `files` says of the sources behind op/backend; None without `files`."""
    if files is None:
        return None
    family = op.split(".")[0]
    lines = [f"{path} {digest}" for path, digest in sorted(files.items()) if _counts(path, family, backend)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def running(op: str, backend: str) -> str | None:
    """The fingerprint of what runs here now."""
    return fingerprint(op, backend, built_from() if backend == "cuda" else on_disk())


def current(op: str, backend: str) -> str | None:
    """The fingerprint of the source tree."""
    return fingerprint(op, backend, on_disk())
