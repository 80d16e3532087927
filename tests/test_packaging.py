"""A wheel into an empty environment, the editable install, and what must not be imported by accident."""

import importlib
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import triskele

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, ROOT)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory):
    """A new environment with the wheel; the dependencies come from this one's folder, whose own .pth files (the
    editable install among them) are not read from there."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_wheel_holds_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("triskele/libtriskele_cpu.so", "triskele/triton_kernels/__init__.py", "triskele/assets/__init__.py",
                   "triskele/verified.json",
                   "triskele/assets/digits-wan/transformer/config.json", "triskele/diffusers/adapters/wan.py"):
        assert wanted in names, wanted
    assert any(n.startswith("triskele/_C.") for n in names)
    assert not any(n.startswith(("tests/", "triton_kernels/", "csrc/", "bench/")) for n in names)


def test_wheel_runs_in_an_empty_environment(empty_environment, tmp_path):
    code = ("import triskele, torch, triskele.triton_kernels\n"
            "print(triskele.__file__)\n"
            "q = torch.randn(1, 2, 40, 16)\n"
            "m = triskele.ops.route_blocks(q, q, keep=0.5, block_q=8, block_k=8)\n"
            "o = triskele.ops.sparse_linear_attention(q, q, q, m, block_q=8, block_k=8, backend='cpu')\n"
            "assert o.shape == q.shape and torch.isfinite(o).all()\n"
            "print(triskele.digits.asset_path('digits-wan'))\n")
    out = run(empty_environment, "-c", code, cwd=tmp_path)
    assert str(ROOT / "python") not in out and str(ROOT / "assets") not in out
    assert "triskele" in run(empty_environment, "-m", "triskele.cli", "doctor", cwd=tmp_path)


def test_editable_install_maps_every_package():
    assert Path(triskele.__file__).is_relative_to(ROOT / "python")
    for name, folder in (("triskele.triton_kernels", "triton_kernels"), ("triskele.assets", "assets")):
        assert Path(importlib.import_module(name).__file__).parent == ROOT / folder


def test_the_bare_name_of_triton_kernels_is_guarded():
    done = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "triskele.triton_kernels" in done.stderr


def test_the_native_library_has_no_python_in_it():
    library = Path(triskele.__file__).parent / "libtriskele_cpu.so"
    needed = run("readelf", "-d", library)
    assert "libtorch_python" not in needed and "libpython" not in needed
    undefined = run("nm", "-D", "--undefined-only", library)
    assert " Py" not in undefined
    assert "_ZN2at" not in undefined and "_ZN3c10" not in undefined, "calls past the stable ABI"
