"""Builds the native libraries and maps the packages.

libtriskele_cpu.so    csrc/schema.cpp, csrc/cpu/register.cpp once; every other csrc/cpu/*.cpp once per instruction set
libtriskele_cuda.so   csrc/cuda/*.cu, where nvcc is found (a GPU need not be); the file name's suffix names the target
triskele._C           csrc/module.cpp: tells how the two were built

Both libraries are free of Python and use torch's stable ABI of 2.10, so one build serves every later torch.
built_from.json       the SHA-256 of every source at the start of the build: a record of a GPU run names what it ran
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = ["-std=c++20", "-O3", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fopenmp-simd", "-fno-math-errno",
             "-fno-trapping-math", "-fvisibility=hidden", STABLE_ABI]
X86_LEVELS = {  # weakest first: the linker keeps the first copy of an inline function, which must run everywhere
    "base": [],
    "avx2": ["-march=haswell"],
    "avx512": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mprefer-vector-width=512"],
    "amx": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-int8",
            "-mamx-bf16", "-mprefer-vector-width=512"],
}
ARM_LEVELS = {"base": [], "dotprod": ["-march=armv8.2-a+dotprod"]}
LEVELS = {"x86_64": X86_LEVELS, "AMD64": X86_LEVELS, "aarch64": ARM_LEVELS}  # by platform.machine()
NVCC_TARGETS = {  # by file suffix; "sm80" also leaves PTX that newer chips translate
    "sm80": ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
             "-gencode=arch=compute_90,code=compute_90"],
    "sm90": ["-gencode=arch=compute_90a,code=sm_90a"],
}
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr",
              "-DUSE_CUDA", STABLE_ABI]


def cpu_levels():
    """The levels to compile. TRISKELE_BUILD_LEVELS="base amx" leaves the others out: a quicker build, for trials."""
    levels = LEVELS.get(platform.machine(), {"base": []})
    wanted = os.environ.get("TRISKELE_BUILD_LEVELS", "").split() or list(levels)
    if "base" not in wanted or not set(wanted) <= set(levels):
        sys.exit(f"TRISKELE_BUILD_LEVELS: expected base and any of {', '.join(levels)}, got {' '.join(wanted)}")
    return {level: flags for level, flags in levels.items() if level in wanted}


def has_levels():
    """What csrc/cpu/register.cpp is told about them."""
    return [f"-DTRISKELE_HAS_{level}={int(level in cpu_levels())}" for level in {**X86_LEVELS, **ARM_LEVELS}]


def torch_paths():
    try:
        import torch
    except ImportError:
        sys.exit("triskele: building needs torch >= 2.10 in this environment: install torch first, then "
                 "`pip install --no-build-isolation .`")
    base = Path(torch.__file__).parent
    return base / "include", base / "lib"


def nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def source_hashes():
    """Path of every file under csrc -> its SHA-256."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _replace(source: Path, target: Path) -> None:
    """Copy as a new file: a process that has the old one mapped keeps it, instead of crashing in the middle of it."""
    if target.exists() and source.samefile(target):
        return
    target.unlink(missing_ok=True)
    shutil.copy2(source, target)


class NinjaBuild(build_ext):
    """Writes one build.ninja for both libraries and runs it; `_C` is built as any pybind11 module."""

    def build_extensions(self):
        package = Path(self.get_ext_fullpath("triskele._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve() / "native"
        work.mkdir(parents=True, exist_ok=True)
        targets = self.write_ninja(work)
        (work / "built_from.json").write_text(json.dumps({name: source_hashes() for name in targets}, indent=1) + "\n")
        targets.append("built_from.json")
        from ninja import BIN_DIR  # pip's ninja; its folder need not be on PATH
        subprocess.run([str(Path(BIN_DIR) / "ninja"), "-C", str(work)], check=True)
        for target in targets:
            _replace(work / target, package / target)
        self.libraries_built = [package / target for target in targets]
        super().build_extensions()

    def copy_extensions_to_source(self):  # in-place and editable builds
        super().copy_extensions_to_source()
        for path in self.libraries_built:
            _replace(path, ROOT / "python" / "triskele" / path.name)

    def get_outputs(self):  # so that an uninstall removes them too
        return super().get_outputs() + [str(p) for p in getattr(self, "libraries_built", [])]

    def write_ninja(self, work):
        include, lib = torch_paths()
        extra = os.environ.get("TRISKELE_CXXFLAGS", "")  # sanitizers, say
        sources = ROOT / "csrc"
        lines = [
            f"cxxflags = {' '.join(CXX_FLAGS)} -I{include} -I{sources} {extra}",
            "rule cxx", f"  command = {os.environ.get('CXX', 'g++')} $cxxflags $level -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d", "  deps = gcc",
            "rule link",
            f"  command = {os.environ.get('CXX', 'g++')} -shared $in -o $out -L{lib} -ltorch -ltorch_cpu -lc10 {extra}",
        ]
        objects = []
        for name in ("schema.cpp", "cpu/register.cpp"):
            objects.append(f"{Path(name).stem}.o")
            lines += [f"build {objects[-1]}: cxx {sources / name}", f"  level = {' '.join(has_levels())}"]
        for level, flags in cpu_levels().items():
            for path in sorted((sources / "cpu").glob("*.cpp")):
                if path.name == "register.cpp":
                    continue
                objects.append(f"{path.stem}.{level}.o")
                lines += [f"build {objects[-1]}: cxx {path}", f"  level = {' '.join(flags)} -DTRISKELE_LEVEL={level}"]
        lines.append(f"build libtriskele_cpu.so: link {' '.join(objects)}")
        targets = ["libtriskele_cpu.so"]
        kernels = sorted((sources / "cuda").glob("*.cu"))
        if kernels and nvcc():
            lines += ["rule nvcc", f"  command = {nvcc()} {' '.join(NVCC_FLAGS)} -I{include} -I{sources} $target "
                      "-MD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc",
                      "rule nvlink", f"  command = {nvcc()} -shared $in -o $out -L{lib} -ltorch -ltorch_cpu -lc10"]
            cuda_objects = []
            for path in kernels:
                cuda_objects.append(f"{path.stem}.cuda.o")
                lines += [f"build {cuda_objects[-1]}: nvcc {path}",
                          f"  target = {' '.join(NVCC_TARGETS[path.stem.rsplit('_', 1)[-1]])}"]
            lines.append(f"build libtriskele_cuda.so: nvlink {' '.join(cuda_objects)}")
            targets.append("libtriskele_cuda.so")
        elif kernels:
            print("triskele: no nvcc found, building without CUDA kernels", file=sys.stderr)
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        return targets


def build_info():
    kernels = sorted(p.stem.rsplit("_", 1)[-1] for p in (ROOT / "csrc" / "cuda").glob("*.cu")) if nvcc() else []
    return [("TRISKELE_CPU_LEVELS", '"' + " ".join(cpu_levels()) + '"'),
            ("TRISKELE_CUDA_TARGETS", '"' + " ".join(sorted(set(kernels))) + '"')]


setup(
    packages=[*find_packages("python"), "triskele.triton_kernels", "triskele.assets"],
    ext_modules=[Extension("triskele._C", ["csrc/module.cpp"], include_dirs=[pybind11.get_include()],
                           define_macros=build_info(), extra_compile_args=["-std=c++20", "-O2"],
                           depends=["setup.py"])],
    cmdclass={"build_ext": NinjaBuild},
)
