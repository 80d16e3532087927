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
    assert list(build["cpu_levels"]()) == ["base", "dotprod"]
    flags = [*build["CXX_FLAGS"], "-Werror", f"-I{build['torch_paths']()[0]}", f"-I{ROOT / 'csrc'}"]

    def compiled(job):
        path, options, _ = job
        return subprocess.run([COMPILER, *flags, *options, "-c", path, "-o", tmp_path / "-".join(
            [path.stem, *options])], capture_output=True, text=True)

    once = [ROOT / "csrc" / "schema.cpp", ROOT / "csrc" / "cpu" / "register.cpp"]
    families = sorted(set((ROOT / "csrc" / "cpu").glob("*.cpp")) - set(once))
    jobs = [*((path, build["has_levels"](), "") for path in once),
            *((path, [*options, f"-DTRISKELE_LEVEL={level}"], level)
              for level, options in build["cpu_levels"]().items() for path in families
              if level == "base" or path.stem == "svdq")]  # the others have no text of their own above base
    with ThreadPoolExecutor(2) as pool:
        for (path, _, level), done in zip(jobs, pool.map(compiled, jobs)):
            assert done.returncode == 0, f"{path.name} {level}: {done.stderr[-4000:]}"
