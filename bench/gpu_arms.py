"""One of our calls on every GPU backend that can run it: the first is what is measured, the others join its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from case import FAILURES, Calls, error_line
from timing import once

from triskele import backend

ARMS = {"cuda": ("cuda", "triton"), "triton": ("triton",)}
"""Arm -> the GPU backends that `auto` may pick: an op without a CUDA kernel runs on Triton in the first one too."""
CPU_ARMS = {"cpu": ()}


@contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """op -> the backend that was chosen for it, while it lasts. The reference is refused: it would be timed as ours."""
    chosen: dict[str, str] = {}
    explain = backend.explain

    def watching(op, *inputs, **kwargs):
        choice = explain(op, *inputs, **kwargs)
        if choice.chosen == "reference":
            raise NotImplementedError(f"only the reference takes these inputs\n{choice}")
        if choice.chosen is not None:
            chosen[op] = choice.chosen
        return choice

    backend.explain = watching
    try:
        yield chosen
    finally:
        backend.explain = explain


@dataclass(frozen=True)
class Arm:
    """A call with its backends fixed; op -> backend."""

    call: Callable[[], object]
    chosen: dict[str, str]


def under(call: Callable[[], object], names: tuple[str, ...]) -> Callable[[], object]:
    def run():
        with backend.measuring(*names):
            return call()

    run.sets = getattr(call, "sets", 1)
    return run


def arms(call: Callable[[], object], device: torch.device) -> tuple[dict[str, Arm], dict[str, str]]:
    """(arm -> what runs, arm -> why not). An arm that chooses as an earlier one did is left out of both."""
    found: dict[str, Arm] = {}
    refused: dict[str, str] = {}
    for name, names in (ARMS if device.type == "cuda" else CPU_ARMS).items():
        run = under(call, names)
        try:
            with recorded() as chosen:
                once(run, device)
        except NotImplementedError as error:
            refused[name] = "refused: " + " ".join(str(error).split())[:600]
        except FAILURES as error:
            refused[name] = f"fails here: {error_line(error)}"
        else:
            if chosen not in [arm.chosen for arm in found.values()]:
                found[name] = Arm(run, chosen)
    return found, refused


def calls(call: Callable[[], object], device: torch.device, *, peers: dict, absent: dict, flops: float, bytes: float,
          unit: str, graphed: bool = True, uncaptured: tuple[str, ...] = ()) -> Calls:
    """The `Calls` of a GPU case: our first arm against the other arms and the peers."""
    found, refused = arms(call, device)
    absent = absent | {f"triskele {name}": why for name, why in refused.items()}
    if not found:
        raise RuntimeError("no backend runs it: " + "; ".join(f"{name} {why}" for name, why in refused.items()))
    first, *others = found
    return Calls(found[first].call, {f"triskele {name}": found[name].call for name in others} | peers, absent, flops,
                 bytes, unit, found[first].chosen, graphed, uncaptured)
