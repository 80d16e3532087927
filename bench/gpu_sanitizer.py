"""compute-sanitizer over the smallest cases of every GPU backend: memcheck, racecheck, synccheck.

    python bench/gpu_sanitizer.py --out FILE            # with the tool
    python bench/gpu_sanitizer.py --cases               # what it watches: one call of each, no more
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_environment import OUT_OF_TIME, run_all

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # exit status where the tool found something
NOTHING_TO_DO = 77


def tool() -> str | None:
    """On PATH, or beside nvcc."""
    if found := shutil.which("compute-sanitizer"):
        return found
    home = os.environ.get("CUDA_HOME") or (Path(nvcc).resolve().parent.parent if (nvcc := shutil.which("nvcc")) else "")
    beside = Path(home) / "bin" / "compute-sanitizer" if home else None
    return str(beside) if beside and beside.exists() else None


def run_cases() -> int:
    """Two small cases of each op on each backend under test; inputs that a backend refuses are left out."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from gpu.family import backends_of, missing, run
    from gpu.test_kernels import OPS, arguments_of

    count = 0
    for op in OPS.values():
        for backend in backends_of(op.name):
            if missing(op.name, backend):
                continue
            done = 0
            for case in [c for c in op.cases if c.thorough] + [c for c in op.cases if not c.medium]:
                arguments = arguments_of(case)
                try:
                    run(op, arguments, backend)
                except NotImplementedError:
                    continue
                done += 1
                if done == 2:
                    break
            count += done
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what the tool has to say, it says before this line
            print(f"{op.name}/{backend}: {done} calls", flush=True)
    print(f"{count} calls in all")
    return 0 if count else 1


def _options() -> list[str]:
    """What leaves torch's own kernels and API calls out, as far as this version of the tool has it."""
    known = subprocess.run([tool(), "--help"], capture_output=True, text=True).stdout
    wanted = {"--kernel-name-exclude": "kernel_substring=at::native", "--report-api-errors": "no"}
    return [part for option, value in wanted.items() if option in known for part in (option, value)]


def blamed(output: str) -> list[str]:
    """The "op/backend" of each finding: the tool's lines (=========) stand before that of the calls it watched. "?" is
    one after the last call; its opening and closing lines are none."""
    found, said = [], False
    for line in output.splitlines():
        if line.startswith("========="):
            said |= not any(word in line for word in ("COMPUTE-SANITIZER", "SUMMARY", "Target application")) and (
                line.strip("= ") != "")
        elif match := re.match(r"(\S+/\w+): \d+ calls$", line):
            found += [match[1]] if said else []
            said = False
    return found + ["?"] * said


def watched(names: tuple[str, ...], options: list[str], seconds: float) -> list[dict]:
    """The tools over the cases, side by side: how each ended and the end of what it said. "none": without a tool."""
    cases = [sys.executable, __file__, "--cases"]
    commands = {name: cases if name == "none" else
                [tool(), "--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20", *options, *cases]
                for name in names}
    # memory straight from the driver: an overrun leaves its allocation, not only its tensor
    ended = run_all(commands, seconds, os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    results = {0: "clean", FOUND: "errors found", OUT_OF_TIME: "out of time"}
    return [{"tool": name, "result": results.get(end.status, "failed"), "status": end.status, "seconds": end.seconds,
             "blamed": blamed(end.output) if end.status == FOUND else [], "tail": end.output[-6000:]}
            for name, end in ended.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all tools together")
    parser.add_argument("--dry", action="store_true", help="the cases on the CPU, without a tool")
    parser.add_argument("--cases", action="store_true")
    args = parser.parse_args(arguments)
    if args.cases:
        return run_cases()
    record = {"kind": "sanitizer", "dry": args.dry, "runs": []}
    if args.dry:
        record["runs"] = watched(("none",), [], args.seconds)
    elif tool() is None:
        record["absent"] = "compute-sanitizer is not on this machine"
    else:
        record["runs"] = watched(TOOLS, _options(), args.seconds)
    for done in record["runs"]:
        print(f"{done['tool']}: {done['result']} ({done['seconds']:.0f} s)\n{done['tail'][-1500:]}")
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    if "absent" in record:
        print(record["absent"])
        return NOTHING_TO_DO
    return 1 if any(done["status"] for done in record["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
