"""The stages of bench/gpu.sh, each in a process of its own with a time box; a stage that fails does not stop the rest.

    python bench/gpu_run.py [--dry] [--seconds 530] [--out FOLDER] [stage ...]

bench/gpu.sh ends it from outside where it is not done by then.

The records go to FOLDER/<device>/ (default: $OUT, then bench/results; a dry run: build/gpu-dry): run.json (the stages,
how they ended, the build), tests.json, sanitizer.json, bench.json, blocks.json, ncu.json and log.txt. The exit status
is 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from gpu_environment import OUT_OF_TIME, ROOT, folder_name, overlay, reap, run_all

NOTHING_TO_DO = 77
"""Exit status of a stage whose tool is not on this machine: said, and no failure."""

ENDED = 128 + signal.SIGTERM
"""Exit status of this process where it is told to end, as bench/gpu.sh does after nine minutes."""

ASKING = 90.0
"""Seconds for torch's import and the driver's answer."""

PATIENCE = 4
"""A rehearsal's boxes are so many times as long: it may share its cores."""


@dataclass(frozen=True)
class Stage:
    """seconds: its box. command: what runs, {out} being the folder of the records."""

    seconds: int
    command: tuple[str, ...]
    what: str


def _tests(dry: bool) -> tuple[str, ...]:
    command = ["-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=short", "-ra"]
    if not dry and importlib.util.find_spec("xdist"):
        # One test at a time to each worker, in their order: what a time box cuts off are the last families alone.
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "load", "--maxschedchunk", "1"]
    if not dry and importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60", "--timeout-method", "thread"]  # a hung kernel ends its worker, not the run
    return tuple(command)


def stages(dry: bool) -> dict[str, Stage]:
    rehearsal = ("--dry",) if dry else ()
    if dry:
        bench = ("bench/run.py", "--cases", "dry", "--seconds", "0.02", "--out", "{out}/bench.json")
    else:
        bench = ("bench/run.py", "--cases", "short", "--device", "cuda", "--seconds", "1.5", "--budget", "{budget}",
                 "--out", "{out}/bench.json")

    def supervised(name: str, *command: str) -> tuple[str, ...]:
        return ("bench/gpu_supervise.py", "--partial", f"{{out}}/{name}.partial", "--seconds", "{box}", *command)
    return {
        "build": Stage(200, ("bench/gpu_build.py", "--out", "{out}/build.json", *rehearsal),
                       "load the libraries; build them where they are missing or older than their sources"),
        "tests": Stage(170, _tests(dry), "every GPU backend against float64"),
        "sanitizer": Stage(60, ("bench/gpu_sanitizer.py", "--out", "{out}/sanitizer.json", "--seconds", "{box}",
                                *rehearsal), "compute-sanitizer on the smallest cases"),
        "bench": Stage(170, supervised("bench", *bench), "kernels against ceilings and peers"),
        "blocks": Stage(90, supervised("blocks", "bench/gpu_blocks.py", "--out", "{out}/blocks.json", "--seconds",
                                       "{budget}", *rehearsal),
                        "whole transformer blocks with random weights, plain against each arm"),
        "ncu": Stage(45, ("bench/gpu_ncu.py", "--out", "{out}/ncu.json", "--seconds", "{box}", *rehearsal),
                     "counters of the main kernels"),
        "report": Stage(10, ("bench/gpu_report.py", "{out}"), "the tables"),
    }


def box(name: str, chosen: list[str], left: float, known: dict[str, Stage]) -> float:
    """Seconds for a stage: its own box, or less where the later stages would not get a third of theirs."""
    later = sum(known[other].seconds for other in chosen[chosen.index(name) + 1:])
    return max(5.0, min(known[name].seconds, left - later / 3))


def environment(dry: bool, out: Path) -> dict[str, str]:
    """This process's, with the package importable from the tree and the tests' record where it belongs."""
    path = [] if _installed() else [str(overlay(ROOT / "build" / "gpu" / "site"))]
    if before := os.environ.get("PYTHONPATH"):
        path.append(before)
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRISKELE_GPU_RECORD": str(out / "tests.json"),
                         "TRISKELE_GPU_DRY": "1" if dry else "", "TQDM_DISABLE": "1"}


def _installed() -> bool:
    """Whether this interpreter imports the package from this tree, whole."""
    found = importlib.util.find_spec("triskele")
    if found is None or found.origin is None or not Path(found.origin).resolve().is_relative_to(ROOT):
        return False
    return importlib.util.find_spec("triskele.triton_kernels") is not None


def run(command: tuple[str, ...], seconds: float, env: dict[str, str], log) -> int:
    """The exit status of python with these arguments, 124 where it ran out of time; what it prints goes to the log."""
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True)
    os.set_blocking(child.stdout.fileno(), False)
    end = time.monotonic() + seconds
    status = None
    try:
        while status is None and time.monotonic() < end:
            _copy(child.stdout.fileno(), log)
            status = child.poll()
            time.sleep(0.05)
    finally:  # also where this process is told to end
        if status is None:
            status = OUT_OF_TIME
            _stop(child)
        _copy(child.stdout.fileno(), log)
        child.stdout.close()
    return status


def _stop(child: subprocess.Popen) -> None:
    for signalled in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, signalled)  # its own session: this stage and what it started
        except ProcessLookupError:
            break
        time.sleep(1.0)
    reap(child, 1.0)


def _copy(pipe: int, log) -> None:
    """What the pipe holds now, to the log and the screen."""
    while True:
        try:
            read = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return
        if not read:
            return
        for to in (log, sys.stdout):
            to.write(read.decode(errors="replace"))
            to.flush()


def device_of(dry: bool) -> str | None:
    """The folder's name; None where there is no GPU and none is played. A process of its own asks, which may hang."""
    if dry:
        return "dry"
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = run_all({"device": [sys.executable, "-W", "ignore", "-c", ask]}, ASKING)["device"]
    name = found.output.strip().rsplit("\n", 1)[-1]
    if found.status:
        print(f"asking torch for the device: exit status {found.status}, {name}", flush=True)
    return folder_name(name) if name and not found.status else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(stages(False))}; default: all")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--seconds", type=float, default=530.0, help="of all stages together")
    parser.add_argument("--out", type=Path, help="folder of the records' folder")
    parser.add_argument("--list", action="store_true", help="print the stages")
    args = parser.parse_args(arguments)
    start = time.monotonic()  # torch's import counts
    known = stages(args.dry)
    if args.list:
        print("\n".join(f"{name:<11}{stage.seconds:>4} s  {stage.what}" for name, stage in known.items()))
        return 0
    if unknown := set(args.stages) - set(known):
        parser.error(f"stages: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    chosen = [name for name in known if not args.stages or name in args.stages]
    device = device_of(args.dry)
    if device is None:
        parser.error("torch sees no CUDA device here; --dry rehearses the stages on the CPU")
    default = ROOT / "build" / "gpu-dry" if args.dry else Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    out = ((args.out or default) / device).resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))
    try:
        return _all(chosen, known, args, out, start)
    finally:
        signal.signal(signal.SIGTERM, before)


def _all(chosen: list[str], known: dict[str, Stage], args, out: Path, start: float) -> int:
    record = {"kind": "gpu_run", "dry": args.dry, "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "stages": {}}
    with (out / "log.txt").open("w") as log:
        for name in chosen:
            seconds = box(name, chosen, args.seconds - (time.monotonic() - start), known)
            seconds *= PATIENCE if args.dry else 1
            header = f"\n===== {name} (at {time.monotonic() - start:.0f} s, {seconds:.0f} s for it)\n"
            log.write(header)
            print(header, end="", flush=True)
            (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
            sizes = dict(out=out, box=int(seconds * 0.95), budget=int(seconds * 0.8))
            command = tuple(part.format(**sizes) for part in known[name].command)
            (out / f"{name}.json").unlink(missing_ok=True)  # an old one must not pass for this run's
            begin, status = time.monotonic(), ENDED
            try:
                status = run(command, seconds, environment(args.dry, out), log)
            finally:  # what there is stays where this process is ended from outside
                record["stages"][name] = {"status": status, "seconds": round(time.monotonic() - begin, 1),
                                          "box": round(seconds, 1), "result": _result(status)}
                _tidy(name, out, record)
                (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, stage in record["stages"].items():
        print(f"{name:<11}{stage['result']:<14}{stage['seconds']:6.1f} s")
    print(f"records: {out} ({time.monotonic() - start:.0f} s in all)")
    return 1 if any(stage["status"] not in (0, NOTHING_TO_DO) for stage in record["stages"].values()) else 0


def _result(status: int) -> str:
    return {0: "passed", OUT_OF_TIME: "out of time", ENDED: "ended from outside",
            NOTHING_TO_DO: "nothing to do"}.get(status, "failed")


def _tidy(name: str, out: Path, record: dict) -> None:
    """The build's few lines go into run.json; the part of a record that a time limit left is kept, marked."""
    if name == "build" and (out / "build.json").exists():
        record["build"] = json.loads((out / "build.json").read_text())
        (out / "build.json").unlink()
    partial = out / f"{name}.partial"
    if partial.exists():
        left = json.loads(partial.read_text()) | {"cut_off": True}
        (out / f"{name}.json").write_text(json.dumps(left, indent=1) + "\n")
        partial.unlink()


if __name__ == "__main__":
    sys.exit(main())
