"""triskele: sparse attention, 4-bit linears and parallel sampling for existing diffusers pipelines.

    handle = triskele.patch(pipe, attention=triskele.SLA(keep=0.05), linear=triskele.SVDQuant(rank=32))
    handle.summary(); handle.restore()

Importing this package needs neither a GPU nor diffusers; `patch` and `finetune` import diffusers when they are used.
"""

from __future__ import annotations

import importlib

from triskele import _diffusers_hook
from triskele.backend import backends, explain

__version__ = "0.1.0"

_diffusers_hook.install()  # a patched checkpoint loads through diffusers' own from_pretrained

_LAZY = {  # name -> module that holds it; "" for a subpackage itself
    "SLA": "triskele.configs", "VMoBA": "triskele.configs", "SVDQuant": "triskele.configs",
    "ParaTAA": "triskele.configs",
    "patch": "triskele.diffusers",
    "ops": "", "nn": "", "quantize": "", "sampling": "", "finetune": "", "digits": "", "diffusers": "",
}

# without "diffusers": `from triskele import *` must not hide diffusers itself
__all__ = ["__version__", "backends", "explain", *(name for name in _LAZY if name != "diffusers")]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'triskele' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name] or f"triskele.{name}")
    value = getattr(module, name) if _LAZY[name] else module
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
