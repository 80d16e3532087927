"""The CPU kernels on Arm, on a machine that has none: cross-compiled, and their tests run under user-mode emulation.

    python tests/arm.py [pytest arguments]          sets up, builds, then tests/kernels.py on each Arm level
    python tests/arm.py -- FILE.py ...              sets up, builds, then that program by the emulated Python

Wants a Debian with qemu-user and g++-aarch64-linux-gnu. An Arm Python and its libraries are unpacked from Debian's
packages, an Arm torch and what the tests import from PyPI's wheels, all into build/arm: nothing is installed. Then
setup.py itself runs in that Python, with the cross compiler. Tests of the kernels' results, not of their speed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PREFIX = ROOT / "build" / "arm"
DEBIAN = ("python3", "libpython3-dev", "libstdc++6", "libgomp1")
TORCH = "torch==2.10.0"
"""The oldest that is supported, and the last whose Arm wheel needs no CUDA libraries."""
WHEELS = ("numpy", "safetensors", "filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2",
          "markupsafe", "fsspec", "tqdm", "setuptools", "pybind11", "wheel", "packaging", "pytest", "pytest-xdist",
          "execnet", "iniconfig", "pluggy", "pygments", "hypothesis", "sortedcontainers")
SITE = "site-packages"  # by this name hypothesis knows it: it reads every file of other folders for constants
TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
WITH_DOT_PRODUCT, WITHOUT = "neoverse-n1", "a64fx"
"""Processors that qemu knows. Older ones than these stop in torch itself."""


def run(command, **options) -> str:
    done = subprocess.run([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, **options)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stdout[-8000:]}")
    return done.stdout


def unpack_debian(root: Path) -> None:
    """The packages and what they depend on, with apt's lists and cache in a folder of their own."""
    apt = PREFIX / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # nothing is installed
    options = ["APT::Architecture=arm64", "APT::Architectures::=arm64", "APT::Install-Recommends=false",
               "APT::Sandbox::User=", f"Dir::State={apt}/state", f"Dir::State::status={apt}/status",
               f"Dir::Cache={apt}/cache"]
    debian = Path("/etc/apt/sources.list.d/debian.sources")
    if debian.exists():  # only Debian's own source, where it can be told from others
        options += [f"Dir::Etc::sourcelist={debian}", "Dir::Etc::sourceparts=-"]
    command = ["apt-get", "-q", *(word for option in options for word in ("-o", option))]
    run([*command, "update"])
    run([*command, "install", "-y", "--download-only", *DEBIAN])
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(["dpkg", "-x", package, root])


def install_wheels(version: str) -> None:
    """Named one by one: pip would take the markers of dependencies for this machine's."""
    pins = PREFIX / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins.write_text("\n".join(line for line in lines if not line.startswith("torch==")) + "\n")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "-c", pins]
    for tag in TAGS:
        pip += ["--platform", tag]
    run([*pip, "--python-version", version, "--implementation", "cp", "--only-binary=:all:", "--no-compile", "--target",
         PREFIX / SITE, TORCH, *WHEELS])
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "-c", pins, "--target",
         PREFIX / "host", "ninja"])  # runs here, as the compiler does


def write_python(root: Path, version: str) -> None:
    """build/arm/python: the Arm Python in the emulator. To its own children, too, it is this script."""
    python = PREFIX / "python"
    python.write_text(f"""#!/bin/sh
export PYTHONHOME={root}/usr PYTHONPATH={PREFIX}/start:{PREFIX}/lib:{PREFIX}/{SITE}:{PREFIX}/host
export PYTHONPYCACHEPREFIX={PREFIX}/pycache
exec qemu-aarch64 -cpu ${{ARM_CPU:-{WITH_DOT_PRODUCT}}} -L {root} {root}/usr/bin/python{version} "$@"
""")
    python.chmod(0o755)
    start = PREFIX / "start" / "sitecustomize.py"
    start.parent.mkdir(exist_ok=True)
    start.write_text(f"import sys\n\nsys.executable = {str(python)!r}\n")
    headers = PREFIX / "headers" / "aarch64-linux-gnu"  # Python's alone: the C library's come with the compiler
    headers.mkdir(parents=True, exist_ok=True)
    link = headers / f"python{version}"
    link.unlink(missing_ok=True)
    link.symlink_to(root / "usr" / "include" / "aarch64-linux-gnu" / f"python{version}")


def set_up() -> None:
    tools = {"qemu-aarch64": "qemu-user", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "apt-get": "apt",
             "dpkg": "dpkg"}
    if missing := [package for tool, package in tools.items() if not shutil.which(tool)]:
        sys.exit(f"this needs Debian's packages {' '.join(missing)}")
    ready = PREFIX / "ready"
    if ready.exists():
        return
    root = PREFIX / "root"
    PREFIX.mkdir(parents=True, exist_ok=True)
    unpack_debian(root)
    version = os.readlink(root / "usr" / "bin" / "python3").removeprefix("python")
    install_wheels(version)
    write_python(root, version)
    ready.touch()


def build() -> None:
    """setup.py sees an Arm machine: the levels, torch's libraries and the names of the files follow from that."""
    [include] = (PREFIX / "root" / "usr" / "include").glob("python3.*")
    settings = {"CC": "aarch64-linux-gnu-gcc", "CXX": "aarch64-linux-gnu-g++", "CUDA_HOME": str(PREFIX / "no-cuda"),
                "CPATH": f"{PREFIX / 'headers'}:{include}"}
    run([PREFIX / "python", "setup.py", "-q", "build", "--build-lib", PREFIX / "lib", "--build-temp",
         PREFIX / "objects"], cwd=ROOT, env={**os.environ, **settings})


def chosen_level(cpu: str) -> str:
    """The level that the library chooses on that processor."""
    script = "from triskele import _native; print(_native.cpu_library(), _native.cpu_level())"
    said = run([PREFIX / "python", "-c", script], cwd=PREFIX, env={**os.environ, "ARM_CPU": cpu})
    return said.strip().splitlines()[-1].removeprefix("[] ")


def main(arguments) -> int:
    set_up()
    build()
    if arguments[:1] == ["--"]:
        return subprocess.run([PREFIX / "python", *arguments[1:]], cwd=ROOT).returncode
    levels = [chosen_level(cpu) for cpu in (WITHOUT, WITH_DOT_PRODUCT)]
    if levels != ["base", "dotprod"]:
        sys.exit(f"levels chosen on {WITHOUT} and {WITH_DOT_PRODUCT}: expected base and dotprod, got {levels}")
    print(f"{WITHOUT}: base, {WITH_DOT_PRODUCT}: dotprod", flush=True)
    return subprocess.run([PREFIX / "python", "tests/kernels.py", "levels", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
