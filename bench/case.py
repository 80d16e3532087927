"""What a case is, and what the files cases_*.py and gpu_cases.py share. Adding a case touches one of those files only.

    def short() -> list[Case]       the shapes with targets
    def curves() -> list[Case]      the other points of the curves
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from timing import FAILURES, OnThreads

F32, B16 = torch.float32, torch.bfloat16
SETS = 3  # of inputs, rotated


@dataclass
class Calls:
    """`ours` against `peers`; absent: peer -> why it does not run here.

    flops, bytes  of our algorithm, once: what the floor is made of
    unit          arithmetic of the floor: "float32", "bfloat16" or "int8"
    backends      op -> the backend that `ours` runs it on, where the case chose it
    graphed       on a GPU: time replays of a CUDA graph, ours and the peers', so that launch gaps stay out
    uncaptured    peers that wait for the GPU within a call, which no graph holds
    """

    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    absent: dict[str, str]
    flops: float
    bytes: float
    unit: str
    backends: dict[str, str] = field(default_factory=dict)
    graphed: bool = False
    uncaptured: tuple[str, ...] = ()


@dataclass
class Case:
    """make(device) -> Calls.

    group    what `run.py --only` takes, and a section of docs/benchmarks.md
    targets  peer -> ratio that we aim at
    curves   name of a plot ("keep, %") -> where on its axis this case is
    label    a row of the README's table, in its words; "" for none
    devices  on which it means something
    """

    name: str
    group: str
    make: Callable[[torch.device], Calls]
    targets: dict[str, float] = field(default_factory=dict)
    curves: dict[str, float] = field(default_factory=dict)
    label: str = ""
    devices: tuple[str, ...] = ("cpu",)


def error_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def set_up(name: str, make: Callable[[], Callable], calls: dict, absent: dict) -> None:
    """Add a peer: `make` imports what it needs and returns its call. What that raises is why the peer is absent.

    The one way by which a peer joins a case: a package that is broken costs its own column, and not our row. (Its calls
    are guarded by bench/run.py.)
    """
    try:
        calls[name] = make()
    except FAILURES as error:
        absent[name] = f"cannot be set up: {error_line(error)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def drifting(device, dtype, batch, heads, length, dim, sets=SETS) -> list[tuple]:
    """(q, k, v) [B, H, L, D] whose tokens drift along the sequence: blocks differ in their means, as in a model."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor():
        def normal(count):
            return torch.randn(batch, heads, count, dim, generator=generator, device=device)

        drift = normal(math.ceil(length / 64)).repeat_interleave(64, 2)
        return (normal(length) + drift[:, :, :length]).to(dtype)

    return [(tensor(), tensor(), tensor()) for _ in range(sets)]


def thread_scaling(case: Case, target: float = 1.8) -> Case:
    """The same call on two threads, with itself on one thread for a peer."""

    def make(device):
        calls = case.make(device)
        peers, absent = {"one thread": OnThreads(calls.ours, 1)}, {}
        if torch.get_num_threads() < 2:
            peers, absent = {}, {"one thread": "torch has a single thread here"}
        return replace(calls, ours=OnThreads(calls.ours, 2), peers=peers, absent=absent)

    return Case(f"two threads: {case.name}", "threads", make, {"one thread": target})
