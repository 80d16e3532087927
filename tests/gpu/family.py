"""What a family says of its ops, so that one set of tests covers every backend in their tables."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from triskele import ops  # noqa: F401  the tables register themselves on import
from triskele.backend import TABLES, select

DRY = bool(os.environ.get("TRISKELE_GPU_DRY"))
"""A rehearsal on the CPU: its kernels in the place of a GPU's (or, by "emulated", the CUDA kernels emulated), small
cases only."""
DEVICE = torch.device("cpu" if DRY else "cuda")


@dataclass(frozen=True)
class Case:
    """Arguments of one call.

    make    seed -> the custom op's arguments without its backend, on the CPU; another seed: the same shapes, other
            values
    medium  too large for a rehearsal
    thorough  also run for bits, graphs, streams and layouts, not for accuracy alone
    """

    name: str
    make: Callable[[int], tuple]
    medium: bool = False
    thorough: bool = False


@dataclass(frozen=True)
class Op:
    """An op of the tables.

    custom   the torch.library op that calls it, torch.ops.triskele.<custom>
    compare  (arguments, outputs, the reference's in float64) -> raises where an error is past its budget
    relaid   positions of the arguments that may have any strides
    """

    name: str
    custom: str
    cases: tuple[Case, ...]
    compare: Callable[[tuple, tuple, tuple], None]
    relaid: tuple[int, ...] = ()


def mapped(value, function: Callable[[torch.Tensor], torch.Tensor]):
    """`function` of every tensor in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(part, function) for part in value)
    return value


def exact_arguments(arguments: tuple) -> tuple:
    """The same values in float64: what the reference then returns is not rounded to the kernel's dtype."""
    return mapped(arguments, lambda t: t.double() if t.is_floating_point() else t)


def overload(op: Op):
    return getattr(torch.ops.triskele, op.custom).default


def takes_backend(op: Op) -> bool:
    return overload(op)._schema.arguments[-1].name == "backend"


def run(op: Op, arguments: tuple, backend: str) -> tuple[torch.Tensor, ...]:
    """The outputs of one backend, asked for by name."""
    if takes_backend(op):
        out = overload(op)(*arguments, backend)
    else:  # the op leaves the choice to `auto`, which picks no unverified kernel
        out = select(op.name, *arguments, backend=backend).run(*arguments)
    return tuple(out) if isinstance(out, (list, tuple)) else (out,)


def run_or_skip(op: Op, arguments: tuple, backend: str) -> tuple[torch.Tensor, ...]:
    """`run`; inputs that the backend refuses, with its reasons, are no failure: the record counts them apart."""
    try:
        return run(op, arguments, backend)
    except NotImplementedError as error:
        if "no backend takes these inputs" not in str(error):
            raise
        reasons = [line for line in str(error).splitlines() if line.startswith(f"  {backend}:")]
        pytest.skip("refused: " + "; ".join(line.split(":", 1)[1].strip() for line in reasons))


def backends_of(op: str) -> list[str]:
    """The backends under test: a GPU's, in a rehearsal the CPU's kernels."""
    wanted = "cpu" if DRY else "cuda"
    return [entry.name for entry in TABLES[op] if entry.device_type == wanted]


def by_entry(items: list) -> list:
    """The tests of one op and backend side by side, the ops in the order in which they are named first: a run that is
    cut off has verified the first of them, and not a part of each. Triton's come last: they compile."""
    ranks: dict[str, int] = {}

    def place(item) -> tuple:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "op" not in values:
            return ()
        return values["backend"] == "triton", ranks.setdefault(values["op"].name, len(ranks)), values["backend"]

    return sorted(items, key=place)


def missing(op: str, backend: str) -> list[str]:
    return next(entry for entry in TABLES[op] if entry.name == backend).missing()
