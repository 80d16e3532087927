"""The CPU kernels compile for Arm, where the cross compiler is installed (Debian: g++-aarch64-linux-gnu)."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow
def test_kernels_compile_for_arm(tmp_path, monkeypatch):
    if not shutil.which(COMPILER):
        pytest.skip(f"{COMPILER} is not installed")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    build = runpy.run_path(str(ROOT / "setup.py"))
    assert build["cpu_levels"]() == {"base": []}
    flags = [*build["CXX_FLAGS"], "-Werror", f"-I{build['torch_paths']()[0]}", f"-I{ROOT / 'csrc'}"]

    def compiled(path):
        level = build["has_levels"]() if path.parent.name != "cpu" or path.name == "register.cpp" else [
            "-DTRISKELE_LEVEL=base"]
        return subprocess.run([COMPILER, *flags, *level, "-c", path, "-o", tmp_path / f"{path.stem}.o"],
                              capture_output=True, text=True)

    sources = [ROOT / "csrc" / "schema.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        for path, done in zip(sources, pool.map(compiled, sources)):
            assert done.returncode == 0, f"{path.name}: {done.stderr[-4000:]}"
