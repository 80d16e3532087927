"""Alternating measurement: ours and the peers take turns in one process, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, fastest, and the middle half's spread over the median."""

    median_ms: float
    min_ms: float
    spread: float
    samples: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        ordered = sorted(milliseconds)
        quarter = len(ordered) // 4
        middle = ordered[quarter:len(ordered) - quarter]
        median = statistics.median(ordered)
        return cls(median, ordered[0], (middle[-1] - middle[0]) / median, len(ordered))


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: device events on a GPU, the clock on the CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def alternate(calls: dict[str, Callable[[], object]], device: torch.device, *, seconds: float = 4.0,
              least: int = 5, most: int = 200) -> dict[str, Timing]:
    """Time every call in turns, after one warm-up each, for about `seconds` in all.

    Each call should rotate its own inputs (`rotating`), so that they do not sit in the cache.
    """
    for call in calls.values():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < least or (time.perf_counter() < end and turns < most):
        for name, call in calls.items():
            samples[name].append(once(call, device))
        turns += 1
    return {name: Timing.of(values) for name, values in samples.items()}


def rotating(function: Callable, inputs: list[tuple]) -> Callable[[], object]:
    """A call without arguments that uses the next set of inputs each time."""
    state = {"next": 0}

    def call():
        arguments = inputs[state["next"] % len(inputs)]
        state["next"] += 1
        return function(*arguments)

    return call


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches now: copy (read + write) in GB/s, matrix products in TFLOP/s on random data."""
    big = 1 << (26 if device.type == "cpu" else 29)
    source, target = torch.randn(big // 4, device=device), torch.empty(big // 4, device=device)
    size = 1024 if device.type == "cpu" else 8192
    calls, work = {"copy": lambda: target.copy_(source)}, {"copy": 2 * big / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        calls[name], work[name] = (lambda a=a, b=b: a @ b), 2 * size**3 / 1e12
    found = alternate(calls, device, seconds=2.0)
    units = {"copy": "copy_gb_s", "float32": "float32_tflop_s", "bfloat16": "bfloat16_tflop_s"}
    return {units[name]: work[name] / (timing.median_ms / 1e3) for name, timing in found.items()}
