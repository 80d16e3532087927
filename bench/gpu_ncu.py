"""Hardware counters of the main kernels by Nsight Compute, where it is on the machine and may read them.

    python bench/gpu_ncu.py --out FILE        # one profiled call of each main case and arm
    python bench/gpu_ncu.py --cases           # what ncu watches
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

from gpu_environment import run_all

NOTHING_TO_DO = 77
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")
LAUNCHES = 48  # at most; each is replayed a few dozen times


def tool() -> str | None:
    if found := shutil.which("ncu"):
        return found
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    beside = Path(home) / "bin" / "ncu"
    return str(beside) if beside.exists() else None


def run_cases(dry: bool) -> int:
    """Each main case once on each arm, between cudaProfilerStart and Stop: set-up and warm-up are not profiled."""
    import gpu_cases
    import torch
    from case import FAILURES, error_line

    if dry:
        chosen, device = gpu_cases.dry()[:2], torch.device("cpu")
    else:
        device = torch.device("cuda")
        wan = (12, 32760, 128, 0.05)
        chosen = [gpu_cases.sla_forward(*wan, peers=False), gpu_cases.linear(4608, 3072, 12288),
                  gpu_cases.sla_backward(*wan), gpu_cases.taa_step(100, (4, 64, 64)),
                  gpu_cases.vmoba(gpu_cases.WAN, (5, 13), 12, 128, top_k=6), gpu_cases.linear(16, 3072, 12288)]
    failed = 0
    for case in chosen:
        try:
            calls = case.make(device)
            ours = {"": calls.ours} | {name: call for name, call in calls.peers.items() if name.startswith("triskele ")}
            for name, call in ours.items():
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                print(f"ran {case.name} {name}", flush=True)
        except FAILURES as error:
            failed += 1
            print(f"{case.name}: {error_line(error)}", flush=True)
    return 1 if failed else 0


def parsed(text: str) -> list[dict]:
    """ncu's CSV of page "details" -> a dict a launch: kernel, grid, block, {"section, metric": "value unit"}."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    launches: dict[str, dict] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[starts[0]:]))) if starts else ():
        if not row.get("Metric Name"):
            continue
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "grid": row.get("Grid Size"),
                                                 "block": row.get("Block Size"), "counters": {}})
        value = f"{row['Metric Value']} {row.get('Metric Unit') or ''}".strip()
        launch["counters"][f"{row['Section Name']}, {row['Metric Name']}"] = value
    return list(launches.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--dry", action="store_true", help="the cases on the CPU, without ncu")
    parser.add_argument("--cases", action="store_true")
    args = parser.parse_args(arguments)
    if args.cases:
        return run_cases(args.dry)
    record = {"kind": "ncu", "dry": args.dry, "launches": []}
    command = [sys.executable, __file__, "--cases", *(["--dry"] if args.dry else [])]
    if not args.dry:
        if tool() is None:
            print("ncu is not on this machine")
            return NOTHING_TO_DO
        sections = [part for section in SECTIONS for part in ("--section", section)]
        command = [tool(), "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details",
                   "--launch-count", str(LAUNCHES), *sections, *command]
    ended = run_all({"ncu": command}, args.seconds)["ncu"]
    status, text = ended.status, ended.output
    record |= {"status": status, "launches": parsed(text)}
    if not record["launches"]:
        record["tail"] = text[-4000:]
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(record['launches'])} launches")
    if not record["launches"]:
        print(text[-2000:])
    return status or (0 if record["launches"] or args.dry else 1)


if __name__ == "__main__":
    sys.exit(main())
