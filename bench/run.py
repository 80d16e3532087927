"""Measures the cases against their peers and leaves one JSON record.

    python bench/run.py                          # the shapes with targets, a few minutes
    python bench/run.py --cases curves           # the curves over L, keep, head_dim and M too
    python bench/run.py --only svdq_linear       # one group
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import registry
import torch
from timing import alternate, ceilings
from tqdm import tqdm

from triskele import machine


def measure(case: registry.Case, device: torch.device, ceiling: dict, seconds: float) -> dict:
    """One case's record: timings, floor, ratios, and what the targets ask."""
    calls = case.make(device)
    timings = alternate({"triskele": calls.ours, **calls.peers}, device, seconds=seconds)
    ours = timings["triskele"].median_ms
    peak = ceiling["bfloat16_tflop_s" if calls.dtype in (torch.bfloat16, torch.float16) else "float32_tflop_s"]
    floor = {"operations_ms": calls.flops / peak / 1e9, "bytes_ms": calls.bytes / ceiling["copy_gb_s"] / 1e6}
    return {
        "name": case.name, "group": case.group, "dtype": str(calls.dtype)[6:],
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "ratios": {name: t.median_ms / ours for name, t in timings.items() if name != "triskele"},
        "targets": case.targets, "absent": calls.absent, "flops": calls.flops, "bytes": calls.bytes, "floor": floor,
        "of_floor": max(floor.values()) / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=("short", "curves"), default="short")
    parser.add_argument("--only", help="groups, comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="a case")
    parser.add_argument("--out", type=Path, help="the record (default bench/results/<device>/<cases>.json)")
    args = parser.parse_args()
    device = torch.device(args.device)
    chosen = [c for c in registry.cases(args.cases) if args.only is None or c.group in args.only.split(",")]
    if not chosen:
        parser.error(f"--only: expected some of {sorted({c.group for c in registry.cases('curves')})}, got {args.only}")
    record = {"kind": "bench", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "machine": machine.describe(), "ceilings": ceilings(device), "cases": []}
    for case in (bar := tqdm(chosen)):
        bar.set_description(case.name)
        torch.manual_seed(0)
        record["cases"].append(measure(case, device, record["ceilings"], args.seconds))
        row = record["cases"][-1]
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
        tqdm.write(f"{case.name}: {row['timings']['triskele']['median_ms']:.2f} ms, {ratios}, "
                   f"{row['of_floor']:.0%} of the floor")
    out = args.out or Path(__file__).parent / "results" / device.type / f"{args.cases}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {out}")


if __name__ == "__main__":
    main()
