"""Alternating measurement: ours and the peers take turns in one process, so that drift hits all alike."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

FAILURES = (Exception,)
"""What a case or a peer may raise without ending the run: all but what ends a program. No list of classes would do:
triton.CompilationError, CalledProcessError and what foreign packages define derive from none but this one. Whoever
catches it records it, with its text."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Has large results come from memory that was freed before, and not as fresh pages of the system; whether it can.

    glibc maps what is larger than some 32 MB anew each time: zeros, in which no poison is left, so that a value that is
    never written would pass for one; and page faults, which are the system's time and not a kernel's. It holds for ours
    and the peers, and from then on. With another C library (False) large results are checked as far as memory returns.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """To the system, between two cases."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(ctypes.c_size_t(0))


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


@dataclass(frozen=True)
class OnThreads:
    """A call that is timed on so many of torch's threads."""

    call: Callable[[], object]
    threads: int

    def __call__(self):
        return self.call()


@contextmanager
def threads_of(call: Callable) -> Iterator[None]:
    """torch's threads as the call asks for, if it does; set outside the timed part."""
    if not isinstance(call, OnThreads):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(call.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Graphed:
    """A call captured `times` times in a CUDA graph; calling it replays them. `once` gives the time of one."""

    def __init__(self, call: Callable[[], object], times: int):
        self.times = times
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(max(2, times)):  # every set of inputs once: a launcher may prepare a weight on its first use
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(times):
                self.result = call()

    def __call__(self):
        self.graph.replay()
        return self.result


def tensors_of(result) -> list[torch.Tensor]:
    """The tensors in a call's result, however nested."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in tensors_of(part)] if isinstance(result, (tuple, list)) else []


def poison(result) -> None:
    """NaN over a result that is thrown away: the next call gets that memory, and has to write all of it."""
    for tensor in tensors_of(result):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))


def poison_freed(like) -> None:
    """NaN in memory that the allocator hands out next for results like these."""
    for tensor in [torch.empty_like(t) for t in tensors_of(like) for _ in range(2)]:
        poison(tensor)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: device events on a GPU, the clock on the CPU. Its result is poisoned afterwards."""
    with threads_of(call):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = call()
            end.record()
            end.synchronize()
            milliseconds = start.elapsed_time(end) / getattr(call, "times", 1)
        else:
            begin = time.perf_counter()
            result = call()
            milliseconds = (time.perf_counter() - begin) * 1e3
    poison(result)
    return milliseconds


def alternate(calls: dict[str, Callable[[], object]], device: torch.device, *, seconds: float = 4.0,
              least: int = 5, most: int = 200, warm: bool = False,
              failed: dict[str, Exception] | None = None) -> dict[str, Timing]:
    """Time every call in turns, after one warm-up each (unless they are `warm`), for about `seconds` in all.

    At least `least` turns, or 3 once they have taken four times `seconds` (and four seconds). From the second turn on
    a call that is much faster than the slowest one is timed a few times a turn. One that takes longer than `seconds`
    (and a second) by itself has three turns, and its time does not count: the others are not measured less for it. Each
    call should rotate its own inputs (`rotating`), so that they do not sit in the cache.

    failed  takes what the calls behind the first one raise on the way, by name; they have no timing then
    """
    calls, first = dict(calls), next(iter(calls))
    keep_freed_memory()
    for call in () if warm else calls.values():
        once(call, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    passed, slow, turns = dict.fromkeys(calls, 0.0), set(), 0
    while turns < most:
        counted = sum(passed[name] for name in calls if name not in slow)
        if (turns >= least and counted >= seconds) or (turns >= 3 and (
                counted >= 4 * max(seconds, 1) or len(slow) == len(calls))):
            break
        for name, call in list(calls.items()):
            if name in slow and turns >= 3:
                continue
            begin = time.perf_counter()
            try:
                samples[name] += [once(call, device) for _ in range(repeats[name])]
            except FAILURES as error:
                if failed is None or name == first:
                    raise
                failed[name] = error
                del calls[name], samples[name]
                slow.discard(name)
            passed[name] += time.perf_counter() - begin
        if turns == 0:
            slow = {name for name, values in samples.items() if values[0] > 1e3 * max(seconds, 1)}
            slowest = max(values[0] for name, values in samples.items() if name not in slow or len(slow) == len(calls))
            if slowest > 1:
                repeats = {name: min(5, max(1, int(slowest / 4 / values[0]))) for name, values in samples.items()}
        turns += 1
    return {name: Timing.of(values) for name, values in samples.items()}


def rotating(function: Callable, inputs: list[tuple]) -> Callable[[], object]:
    """A call without arguments that uses the next set of inputs each time."""
    state = {"next": 0}

    def call():
        arguments = inputs[state["next"] % len(inputs)]
        state["next"] += 1
        return function(*arguments)

    call.sets = len(inputs)
    return call


def ceilings(device: torch.device, seconds: float = 2.0, size: int | None = None) -> dict[str, float]:
    """The best that this machine reaches now: copy (read + write) in GB/s, products [size]^3 in TFLOP/s on random
    data."""
    big = 1 << (26 if device.type == "cpu" else 29)
    source, target = torch.randn(big // 4, device=device), torch.empty(big // 4, device=device)
    size = size or (1024 if device.type == "cpu" else 8192)
    calls, work = {"copy": lambda: target.copy_(source)}, {"copy": 2 * big / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        calls[name], work[name] = (lambda a=a, b=b: a @ b), 2 * size**3 / 1e12
    c, d = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    calls["int8"], work["int8"] = (lambda: torch._int_mm(c, d.t())), 2 * size**3 / 1e12
    found = alternate(calls, device, seconds=seconds)
    units = {"copy": "copy_gb_s"} | {name: f"{name}_tflop_s" for name in ("float32", "bfloat16", "int8")}
    return {units[name]: work[name] / (timing.min_ms / 1e3) for name, timing in found.items()}
