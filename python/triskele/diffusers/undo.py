"""A log of changes that can be taken back: the one way in which an arm touches a model or a pipeline.

Last in, first out, so an attribute that was set twice ends where it began. Values go straight into the dict that holds
them: `DiffusionPipeline.__setattr__` would rewrite the pipeline's config on the way, and `nn.Module.__setattr__` the
order of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_MISSING = object()


class UndoLog:
    """Changes made so far. `rollback()` takes them back and empties the log: a second call does nothing."""

    def __init__(self):
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def call(self, fn: Callable[[], None]) -> None:
        """Run `fn()` on rollback: for a change made outside this log. Record it before making the change."""
        self._undo.append(fn)

    def setattr(self, obj, name: str, value) -> None:
        """`obj.name = value`, on any object (parameters and submodules of a module included). Undone to the very same
        object in the same place; an attribute that was not there is deleted again."""
        descriptor = getattr(type(obj), name, None)
        if hasattr(descriptor, "__set__"):  # a property or a slot: only its owner knows where the value lives
            old = getattr(obj, name)
            self.call(lambda: setattr(obj, name, old))
            setattr(obj, name, value)
            return
        self._move(_store_of(obj, name), _store_for(obj, name, value), name, value)

    def set_module(self, parent: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
        """Child `name` of `parent`: a new one, or in the place of another. `parent` may be a ModuleList, `name` "0"."""
        self._move(_store_of(parent, name), parent._modules, name, module)

    def set_processor(self, attention: torch.nn.Module, processor) -> None:
        """The attention module's processor, whether it holds weights (a module) or not."""
        self.setattr(attention, "processor", processor)

    def register_hook(self, handle) -> None:
        """A handle with `.remove()`, as `register_forward_pre_hook` and its like return."""
        self.call(handle.remove)

    def rollback(self) -> None:
        """Take every change back. All are tried whatever happens; the first error is raised at the end."""
        first = None
        while self._undo:
            try:
                self._undo.pop()()
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first

    def _move(self, source: dict, target: dict, name, value) -> None:
        old = source.get(name, _MISSING)
        followers = list(source)[list(source).index(name) + 1:] if old is not _MISSING else []

        def undo():
            if old is _MISSING:
                target.pop(name, None)
            elif source is target:
                dict.__setitem__(source, name, old)
            else:
                target.pop(name, None)
                dict.__setitem__(source, name, old)
                for follower in followers:  # back to its place in the order
                    if follower in source:
                        dict.__setitem__(source, follower, source.pop(follower))

        self.call(undo)
        if old is not _MISSING and source is not target:
            source.pop(name)
        dict.__setitem__(target, name, value)


def _store_of(obj, name: str) -> dict:
    """The dict that holds `obj.name` now; the one for plain attributes where there is none yet."""
    if isinstance(obj, torch.nn.Module):
        for store in (obj._parameters, obj._buffers, obj._modules):
            if name in store:
                return store
    return obj.__dict__


def _store_for(obj, name: str, value) -> dict:
    """The dict in which `obj.name = value` belongs."""
    if not isinstance(obj, torch.nn.Module):
        return obj.__dict__
    if isinstance(value, torch.nn.Parameter):
        return obj._parameters
    if isinstance(value, torch.nn.Module):
        return obj._modules
    held = _store_of(obj, name)
    keeps = value is None or (held is obj._buffers and isinstance(value, torch.Tensor))
    return held if keeps else obj.__dict__
