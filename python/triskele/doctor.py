"""`triskele doctor`: what this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.util

from triskele import _native, machine
from triskele.backend import backends


def doctor() -> int:
    """Prints the report. Returns 0 when the CPU kernels load (every machine can have those), 1 otherwise."""
    for name, value in machine.describe().items():
        print(f"{name:<14}{value}")
    build = importlib.util.find_spec("triskele._C")
    if build is None:
        print("native build  missing: triskele._C is not in the package")
    else:
        from triskele import _C

        print(f"{'native build':<14}CPU levels {' '.join(_C.cpu_levels())}; CUDA "
              f"{' '.join(_C.cuda_targets()) or 'not built (no nvcc at build time)'}; {_C.compiler()}")
        print(f"{'CPU features':<14}{' '.join(_C.cpu_features())}")
    for name, reasons in (("CPU library", _native.cpu_library()), ("CUDA library", _native.cuda_library()),
                          ("Triton", _native.triton_package())):
        print(f"{name:<14}{'loads' if not reasons else 'no: ' + '; '.join(reasons)}")
    print()
    print(backends())
    print()
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed: triskele.patch needs it; the ops do not")
    else:
        from triskele.diffusers import supported

        print(supported())
    return 1 if _native.cpu_library() else 0
