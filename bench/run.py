"""Measures the cases against their peers and leaves one JSON record.

    python bench/run.py                          # the shapes with targets
    python bench/run.py --cases curves           # the curves over L, keep, head_dim and M too
    python bench/run.py --only svdq_linear       # some groups, printed; a record only where --out names one

A case that fails is recorded with its error, the run goes on, and the exit status is 1 at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import registry
import torch
from case import Calls, Case
from timing import alternate, ceilings, once, poison, tensors_of
from tqdm import tqdm

from triskele import machine

ROOT = Path(__file__).parent.parent
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, ArithmeticError, OSError,
            AssertionError, MemoryError)
"""What a case or a peer may raise without ending the run: all but what ends a program."""


def measure(case: Case, device: torch.device, ceiling: dict, seconds: float, *, peers: bool = True) -> dict:
    """One case's record: timings, floor, ratios, and what the targets ask."""
    torch.manual_seed(0)
    calls = case.make(device)
    absent = dict(calls.absent)
    running = _running(calls, device, absent) if peers else {}
    once(calls.ours, device)
    timings = alternate({"triskele": calls.ours, **running}, device, seconds=seconds, warm=True)
    _check_result(calls.ours())
    ours = timings["triskele"].median_ms
    floor = {"operations_ms": calls.flops / ceiling[f"{calls.unit}_tflop_s"] / 1e9,
             "bytes_ms": calls.bytes / ceiling["copy_gb_s"] / 1e6}
    return {
        "name": case.name, "group": case.group, "label": case.label, "curves": case.curves, "unit": calls.unit,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "ratios": {name: t.median_ms / ours for name, t in timings.items() if name != "triskele"},
        "targets": case.targets, "absent": absent, "flops": calls.flops, "bytes": calls.bytes, "floor": floor,
        "of_floor": max(floor.values()) / ours,
    }


def _running(calls: Calls, device: torch.device, absent: dict) -> dict:
    """The peers that get through one call; the others join `absent`, with their error."""
    running = {}
    for name, call in calls.peers.items():
        try:
            once(call, device)
        except FAILURES as error:
            absent[name] = f"fails here: {_line(error)}"
        else:
            running[name] = call
    return running


def _check_result(result) -> None:
    """Its memory held NaN before: a value that was not written shows."""
    for tensor in tensors_of(result):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(f"the result {list(tensor.shape)} holds values that are not finite")
    poison(result)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def measured(case: Case, device: torch.device, ceiling: dict, seconds: float, *, peers: bool = True) -> dict:
    """`measure`, or the record of its failure."""
    try:
        return measure(case, device, ceiling, seconds, peers=peers)
    except FAILURES as error:
        traceback.print_exc()
        return {"name": case.name, "group": case.group, "error": _line(error)}


def describe(row: dict) -> str:
    if "error" in row:
        return f"{row['name']}: FAILED, {row['error']}"
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
    return (f"{row['name']}: {row['timings']['triskele']['median_ms']:.2f} ms, {row['of_floor']:.0%} of the floor, "
            f"{ratios}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=("short", "curves"), default="short")
    parser.add_argument("--only", help="groups, or parts of names, comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="a case")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--out", type=Path, help="the record (default bench/results/<device>/<cases>.json)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    known = registry.cases(args.cases, device.type)
    chosen = known if args.only is None else [
        c for c in known if any(part == c.group or part in c.name for part in args.only.split(","))]
    if not chosen:
        parser.error(f"--only: expected some of {sorted({c.group for c in known})}, got {args.only}")
    out = args.out
    if out is None and args.only is None:
        out = ROOT / "bench" / "results" / device.type / f"{args.cases}.json"
    record = {"kind": "bench", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "machine": machine.describe(), "seconds_a_case": args.seconds, "ceilings": ceilings(device), "cases": []}
    start = time.perf_counter()
    for case in (bar := tqdm(chosen)):
        bar.set_description(case.name)
        record["cases"].append(measured(case, device, record["ceilings"], args.seconds, peers=not args.no_peers))
        tqdm.write(describe(record["cases"][-1]))
        if out is not None:
            _write(out.with_suffix(".partial"), record)  # what is left where the run is cut off
    record["wall_seconds"] = time.perf_counter() - start
    if out is not None:
        _write(out, record)
        out.with_suffix(".partial").unlink()
        print(f"record: {out}")
    return 1 if any("error" in row for row in record["cases"]) else 0


def _write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
