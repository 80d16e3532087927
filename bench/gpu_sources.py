"""Which sources a GPU backend is made of, as one hash: a record verifies the kernels it ran and no others.

A file counts for a family unless its name begins with another family's: what nobody's name claims, all share.

    cuda    csrc/check.h and csrc/cuda/, as the library says that it was built from them
    triton  triton_kernels/, as they lie on disk

To both belong their launchers, as they lie on disk: the family's backends.py, its <backend>*_backend.py and every
module of the package that they import, directly or not (`launchers`).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from pathlib import Path

from triskele import ops  # noqa: F401  the tables register themselves on import
from triskele.backend import TABLES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "triskele"
LIBRARY = "libtriskele_cuda.so"
SHARED = ("csrc/check.h",)
CHOOSE = ("triskele.backend", "triskele._native", "triskele.checks")
"""Modules that choose a backend, load it, or refuse a call: what a kernel is given does not depend on them."""


def families() -> list[str]:
    return sorted({op.split(".")[0] for op in TABLES})


def gpu_backends() -> list[tuple[str, str]]:
    """(op, backend) of every GPU entry of the tables."""
    return [(op, entry.name) for op, table in sorted(TABLES.items()) for entry in table if entry.device_type == "cuda"]


def on_disk() -> dict[str, str]:
    """Path from the root -> SHA-256, of every file that may matter."""
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "triton_kernels").rglob("*.py"), *PACKAGE.rglob("*.py")]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(files) if path.is_file()}


def built_from(library: str = LIBRARY) -> dict[str, str] | None:
    """Path -> SHA-256 of the sources that the library was built from; None where it does not say."""
    path = ROOT / "python" / "triskele" / "built_from.json"
    return json.loads(path.read_text()).get(library) if path.exists() else None


def _imported(path: Path) -> set[Path]:
    """The files of the package that one of them imports, anywhere in it. A package stands for its __init__.py where a
    name is taken from it that is no module of its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module if not node.level else ".".join(
                ["triskele", *path.relative_to(PACKAGE).parts[:-node.level], *([node.module] if node.module else [])])
            named = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            parts = name.split(".")
            while len(parts) > 1 and parts[0] == "triskele":  # the module, or what holds the name
                if ".".join(parts) in CHOOSE:
                    break
                places = PACKAGE.joinpath(*parts[1:]).with_suffix(".py"), PACKAGE.joinpath(*parts[1:], "__init__.py")
                if any(place.exists() for place in places):
                    found.update(place for place in places if place.exists())
                    break
                parts.pop()
    return found


@functools.cache
def launchers(family: str, backend: str) -> frozenset[str]:
    """The package's files between a family's table and the kernels of one backend; the other's are not among them."""
    folder = PACKAGE / "ops" / family
    other = {"cuda": "triton", "triton": "cuda"}[backend]
    found, todo = set(), [path for path in (folder / "backends.py", *folder.glob(f"{backend}*_backend.py"))
                          if path.exists()]
    while todo:
        path = todo.pop()
        if path not in found and not (path.name.startswith(other) and path.name.endswith("_backend.py")):
            found.add(path)
            todo += _imported(path)
    return frozenset(str(path.relative_to(ROOT)) for path in found)


def _counts(path: str, family: str, backend: str) -> bool:
    if (backend == "cuda" and path in SHARED) or path in launchers(family, backend):
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
    built, lying = built_from(), on_disk()
    if backend == "triton" or built is None:
        return fingerprint(op, backend, None if backend == "cuda" else lying)
    return fingerprint(op, backend, built | {path: digest for path, digest in lying.items() if path.endswith(".py")})


def current(op: str, backend: str) -> str | None:
    """The fingerprint of the source tree."""
    return fingerprint(op, backend, on_disk())
