"""Makes `import triskele` enough for diffusers to load a patched checkpoint, in whichever order the two are imported.

diffusers has no register function for quantizers: an entry in two dicts of `diffusers.quantizers.auto` is the way in.
The entry made here only points to the real one (triskele.diffusers.quantizer), which is imported when a checkpoint asks
for it. Where diffusers has not been imported yet, a finder waits for that module, so that triskele itself never
imports diffusers before it is needed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

AUTO = "diffusers.quantizers.auto"
METHOD = "triskele"


class _Pointer:
    """Stands in for TriskeleConfig until a checkpoint's config.json names the method."""

    @staticmethod
    def from_dict(values, **kwargs):
        from triskele.diffusers.quantizer import TriskeleConfig  # enters both dicts on import

        return TriskeleConfig.from_dict(values, **kwargs)


def _enter(auto) -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Pointer)


class _Loader(importlib.abc.Loader):
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):  # get_source and the like, for tracebacks
        return getattr(self.inner, name)

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module) -> None:
        self.inner.exec_module(module)
        _enter(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, once, by asking the other finders, and has `_enter` run after it."""

    def find_spec(self, name, path=None, target=None):
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Enter the method now, where diffusers' quantizers are there already, or as soon as they are."""
    if AUTO in sys.modules:
        _enter(sys.modules[AUTO])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
