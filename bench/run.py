"""Measures the cases against their peers and leaves one JSON record.

    python bench/run.py                          # the shapes with targets
    python bench/run.py --cases curves           # the curves over L, keep, head_dim and M too
    python bench/run.py --only svdq_linear       # some groups, printed; a record only where --out names one
    python bench/run.py --cases dry              # a GPU's cases, rehearsed on the CPU; the record is marked dry

A case that fails is recorded with its error, the run goes on, and the exit status is 1 at the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import registry
import torch
from calm import BEST_DENSE, CALM, REPEATS, noisy, unrest
from case import FAILURES, SETS, Calls, Case, error_line
from gpu_environment import commit_of
from gpu_supervise import LOST, LOST_ERROR, Progress, context_is_lost
from timing import (
    Graphed,
    alternate,
    ceilings,
    keep_freed_memory,
    once,
    poison,
    poison_freed,
    release_freed_memory,
    tensors_of,
    threads_of,
)
from tqdm import tqdm

from triskele import machine

ROOT = Path(__file__).parent.parent


def measure(case: Case, device: torch.device, ceiling: dict, seconds: float, *, peers: bool = True) -> dict:
    """One case's record: timings, floor, ratios, and what the targets ask."""
    torch.manual_seed(0)
    calls = case.make(device)
    absent = dict(calls.absent)
    running = _running(calls, device, absent) if peers else {}
    once(calls.ours, device)
    timed, extra = {"triskele": calls.ours, **running}, {}
    if calls.graphed and device.type == "cuda":
        timed, extra = _graphed(timed, calls.uncaptured, device)
    timings, repeats = _calmest(timed, device, seconds, case.targets, absent)
    _check_call(timed["triskele"])
    ours = timings["triskele"]["median_ms"]
    dense = [timing["median_ms"] for name, timing in timings.items() if name.startswith("sdpa")]
    best = {BEST_DENSE: min(dense) / ours} if len(dense) > 1 or (dense and BEST_DENSE in case.targets) else {}
    if calls.backends:
        extra["backends"] = calls.backends
    floor = {"operations_ms": calls.flops / ceiling[f"{calls.unit}_tflop_s"] / 1e9,
             "bytes_ms": calls.bytes / ceiling["copy_gb_s"] / 1e6}
    return {
        "name": case.name, "group": case.group, "label": case.label, "curves": case.curves, "unit": calls.unit,
        "timings": timings, "repeats": repeats,
        "ratios": {name: timing["median_ms"] / ours for name, timing in timings.items() if name != "triskele"} | best,
        "targets": case.targets, "absent": absent, "flops": calls.flops, "bytes": calls.bytes, "floor": floor,
        "of_floor": max(floor.values()) / ours, **extra,
    }


def _calmest(timed: dict, device: torch.device, seconds: float, targets: dict,
             absent: dict) -> tuple[dict[str, dict], int]:
    """(timings, how often they were taken): a case with a target is measured again while it is noisy. A peer that
    fails on the way joins `absent`."""
    taken: list[dict[str, dict]] = []
    while not taken or (targets and len(taken) < REPEATS and unrest(taken[-1], targets) > CALM):
        failed: dict[str, Exception] = {}
        found = alternate(timed, device, seconds=seconds, warm=True, failed=failed)
        absent |= {name: f"fails here: {error_line(error)}" for name, error in failed.items()}
        timed = {name: timed[name] for name in found}
        taken.append({name: asdict(timing) for name, timing in found.items()})
    calmest = min(taken, key=lambda timings: unrest(timings, targets))
    return {name: calmest[name] for name in timed}, len(taken)


def _graphed(calls: dict, uncaptured: tuple[str, ...], device: torch.device) -> tuple[dict, dict]:
    """The calls as CUDA graphs, as far as they can be captured, and for the row: what cannot, and ours without one."""
    eager = statistics.median(once(calls["triskele"], device) for _ in range(9))
    timed, refused = {}, {}
    for name, call in calls.items():
        if name in uncaptured:
            timed[name], refused[name] = call, "waits for the GPU"
            continue
        try:
            timed[name] = Graphed(call, max(2 * SETS, getattr(call, "sets", 1)))
            once(timed[name], device)
        except FAILURES as error:
            torch.cuda.synchronize()
            timed[name], refused[name] = call, error_line(error)
    return timed, {"eager_ms": eager, "not_captured": refused}


def _running(calls: Calls, device: torch.device, absent: dict) -> dict:
    """The peers that get through one call; the others join `absent`, with their error."""
    running = {}
    for name, call in calls.peers.items():
        try:
            once(call, device)
        except FAILURES as error:
            absent[name] = f"fails here: {error_line(error)}"
        else:
            running[name] = call
    return running


def _check_call(call) -> None:
    """What was timed once more, on poisoned memory (a graph replays into the result that `once` poisoned): a value that
    it does not write shows."""
    with threads_of(call):
        result = call()
        poison_freed(result)
        poison(result)
        del result
        _check_result(call())


def _check_result(result) -> None:
    for tensor in tensors_of(result):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(f"the result {list(tensor.shape)} holds values that are not finite")
    poison(result)


def measured(case: Case, device: torch.device, ceiling: dict, seconds: float, *, peers: bool = True) -> dict:
    """`measure`, or the record of its failure."""
    try:
        return measure(case, device, ceiling, seconds, peers=peers)
    except FAILURES as error:
        traceback.print_exc()
        return {"name": case.name, "group": case.group, "error": error_line(error)}
    finally:
        release_freed_memory()


def describe(row: dict) -> str:
    if "error" in row:
        return f"{row['name']}: FAILED, {row['error']}"
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
    spread = f" (noisy: {who})" if (who := noisy(row)) else ""
    return (f"{row['name']}: {row['timings']['triskele']['median_ms']:.2f} ms{spread}, {row['of_floor']:.0%} of the "
            f"floor, {ratios}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=("short", "curves", "dry"), default="short")
    parser.add_argument("--only", help="groups, or parts of names, comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="a case")
    parser.add_argument("--budget", type=float, help="seconds in all: the cases that are left then are not measured")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--out", type=Path, help="the record (default bench/results/<device>/<cases>.json)")
    parser.add_argument("--resume", action="store_true", help="go on where the last process, which was lost, stood")
    args = parser.parse_args(arguments)
    dry = args.cases == "dry"
    device = torch.device("cpu" if dry else args.device)
    known = registry.cases(args.cases, device.type)
    chosen = known if args.only is None else [
        c for c in known if any(part == c.group or part in c.name for part in args.only.split(","))]
    if not chosen:
        parser.error(f"--only: expected some of {sorted({c.group for c in known})}, got {args.only}")
    out = args.out
    if out is None and args.only is None and not dry:
        out = ROOT / "bench" / "results" / device.type / f"{args.cases}.json"
    start = time.perf_counter()
    progress = Progress(None if out is None else out.with_suffix(".partial"), lambda: _fresh(args, device), args.resume)
    record = progress.record
    if progress.interrupted is not None:
        record["cases"].append({"name": progress.interrupted, "group": "", "error": LOST_ERROR})
    measured_before = {row["name"] for row in record["cases"]}
    for case in (bar := tqdm([case for case in chosen if case.name not in measured_before])):
        if args.budget is not None and time.perf_counter() - start > args.budget:
            record.setdefault("left_out", []).append(case.name)
            continue
        bar.set_description(case.name)
        progress.begin(case.name)
        record["cases"].append(measured(case, device, record["ceilings"], args.seconds, peers=not args.no_peers))
        tqdm.write(describe(record["cases"][-1]))
        progress.done()
        if failed(record["cases"][-1]) and context_is_lost(device):
            return LOST
    record["wall_seconds"] = time.perf_counter() - start
    if out is not None:
        progress.finish(out)
        print(f"record: {out}")
    return 1 if any(map(failed, record["cases"])) else 0


def _fresh(args, device: torch.device) -> dict:
    """A record without cases."""
    dry, described = args.cases == "dry", machine.describe()
    described["commit"] = commit_of(described)
    return {"kind": "bench", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": described,
            "seconds_a_case": args.seconds, "freed_memory_kept": keep_freed_memory(),
            "ceilings": ceilings(device, 0.0, 256) if dry else ceilings(device),
            "cases": []} | ({"dry": True} if dry else {})


def failed(row: dict) -> bool:
    """Whether the case or one of our own backends failed; peers may."""
    return "error" in row or any(name.startswith("triskele ") and why.startswith("fails here")
                                 for name, why in row["absent"].items())


if __name__ == "__main__":
    sys.exit(main())
