"""The one place that chooses a backend.

Each op has a table: an ordered tuple of `Backend`, in the order cuda, triton, cpu, reference. The first one that has no
reason against the inputs runs. Nothing catches an exception to fall back: what a backend cannot do, its `why_not` says.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

NAMES = ("cuda", "triton", "cpu", "reference")
VERIFIED = Path(__file__).parent / "verified.json"
"""{"op/backend": {architecture: record}}, written by bench/verify.py from the records of `make gpu`."""


def _no_reason(*_args, **_kwargs) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    name      "cuda", "triton", "cpu" or "reference"
    run       the launcher, called with the op's inputs
    why_not   reasons, on these inputs, that this backend refuses them; empty list: it takes them
    missing   reasons that this machine cannot run it at all (a library, a device), whatever the inputs
    verified  GPU backends: architectures ("sm90") on which its tests passed on hardware. `register` fills it from
              verified.json, by hand nobody does. `auto` picks it on those alone; asked for by name it runs anywhere.
    """

    name: str
    run: Callable
    why_not: Callable[..., list[str]] = _no_reason
    missing: Callable[[], list[str]] = _no_reason
    verified: tuple[str, ...] = ()

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"backend name: expected one of {NAMES}, got {self.name!r}")

    @property
    def device_type(self) -> str | None:
        """The device whose tensors it takes; None: any."""
        return {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "reference": None}[self.name]


@dataclass(frozen=True)
class Choice:
    """What `explain` returns: the backend that would run, and each other one's reasons."""

    op: str
    chosen: str | None
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend'}"]
        lines += [f"  {name}: {reason}" for name, reasons in self.reasons.items() for reason in reasons]
        return "\n".join(lines)


TABLES: dict[str, tuple[Backend, ...]] = {}
"""op name ("sla.forward") -> its table; filled by `register`."""


def register(op: str, table: tuple[Backend, ...]) -> tuple[Backend, ...]:
    """Enter an op's table, in the order of `NAMES`."""
    order = [NAMES.index(backend.name) for backend in table]
    if order != sorted(set(order)):
        raise ValueError(f"{op}: expected backends in the order {NAMES}, got {[b.name for b in table]}")
    TABLES[op] = tuple(_with_records(op, backend) for backend in table)
    return TABLES[op]


@functools.cache
def _records() -> dict[str, dict[str, str]]:
    return json.loads(VERIFIED.read_text())


def _with_records(op: str, backend: Backend) -> Backend:
    found = _records().get(f"{op}/{backend.name}", {})
    return replace(backend, verified=tuple(sorted({*backend.verified, *found})))


_measured: tuple[str, ...] | None = None


@contextmanager
def measuring(*names: str) -> Iterator[None]:
    """While it lasts, `auto` picks these GPU backends, verified or not, and no other GPU backend.

    For the runs that make the records, and for comparisons. It holds for the whole process: autograd's threads choose
    backends too.
    """
    global _measured
    before, _measured = _measured, names
    try:
        yield
    finally:
        _measured = before


def may_pick(backend: Backend) -> bool:
    """Whether `auto` may pick it on some device."""
    if backend.device_type != "cuda":
        return True
    return bool(backend.verified) if _measured is None else backend.name in _measured


def architecture(device: torch.device) -> str:
    """ "sm90" for an H100."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _first_tensor(inputs, kwargs) -> torch.Tensor:
    return next(v for v in (*inputs, *kwargs.values()) if isinstance(v, torch.Tensor))


def _trusted(backend: Backend, device: torch.device) -> bool:
    """Whether `auto` may pick it: a GPU kernel counts once its tests have passed on this architecture."""
    if backend.device_type == "cuda" and _measured is None:
        return architecture(device) in backend.verified
    return may_pick(backend)


def _reasons(backend: Backend, device: torch.device, wanted: str, table, inputs, kwargs) -> list[str]:
    if wanted not in ("auto", backend.name):
        return [f"backend={wanted!r} was asked for"]
    if backend.device_type not in (None, device.type):
        return [f"takes {backend.device_type} tensors, got {device.type}"]
    if missing := backend.missing():
        return missing
    if reasons := backend.why_not(*inputs, **kwargs):
        return reasons
    if wanted == "auto" and backend.name == "reference":
        kernels = [b.name for b in table if b.device_type == device.type and _trusted(b, device)]
        if kernels:
            return [f"auto does not pick it where the device has a kernel ({', '.join(kernels)}); "
                    "ask for backend='reference'"]
    if wanted == "auto" and not _trusted(backend, device):
        if _measured is not None:
            return [f"only {', '.join(_measured) or 'no GPU backend'} is being measured"]
        return [f"not verified on {architecture(device)} hardware yet; ask for backend={backend.name!r}"]
    return []


def explain(op: str, *inputs, backend: str = "auto", **kwargs) -> Choice:
    """Which backend would run `op` on these inputs, and why each other one would not."""
    if op not in TABLES:
        raise ValueError(f"op: expected one of {sorted(TABLES)}, got {op!r}")
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {NAMES}, got {backend!r}")
    device = _first_tensor(inputs, kwargs).device
    reasons, chosen = {}, None
    for entry in TABLES[op]:
        if chosen is not None:
            reasons[entry.name] = [f"{chosen} comes first"]
            continue
        found = _reasons(entry, device, backend, TABLES[op], inputs, kwargs)
        if found:
            reasons[entry.name] = found
        else:
            chosen = entry.name
    return Choice(op, chosen, reasons)


def select(op: str, *inputs, backend: str = "auto", **kwargs) -> Backend:
    """The backend that runs `op` on these inputs. NotImplementedError lists every backend's reasons when none does."""
    choice = explain(op, *inputs, backend=backend, **kwargs)
    if choice.chosen is None:
        raise NotImplementedError(f"no backend takes these inputs\n{choice}")
    return next(entry for entry in TABLES[op] if entry.name == choice.chosen)


@dataclass(frozen=True)
class Row:
    """One line of `backends()`."""

    op: str
    backend: str
    runs_here: bool
    why_not: tuple[str, ...]
    verified: tuple[str, ...]


class BackendTable(tuple):
    """The rows of `backends()`; prints as a table."""

    def __str__(self) -> str:
        width = max((len(row.op) for row in self), default=2) + 2
        lines = [f"{'op':<{width}}{'backend':<11}{'here':<6}why not, or where verified"]
        for row in self:
            note = "; ".join(row.why_not) or ", ".join(row.verified)
            lines.append(f"{row.op:<{width}}{row.backend:<11}{'yes' if row.runs_here else 'no':<6}{note}")
        return "\n".join(lines)

    __repr__ = __str__


def backends() -> BackendTable:
    """Every op and backend of the package: whether it runs on this machine, or why not."""
    from triskele import ops  # noqa: F401  the tables register themselves on import

    rows = []
    for op, table in sorted(TABLES.items()):
        for entry in table:
            missing = tuple(entry.missing())
            rows.append(Row(op, entry.name, not missing, missing, entry.verified))
    return BackendTable(rows)
