"""The short tables of a run: python bench/gpu_report.py FOLDER. What did not run is said."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def _record(folder: Path, name: str) -> dict | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def tests_lines(record: dict) -> list[str]:
    lines = [f"{'tests':<34}{'passed':>7}{'failed':>7}{'refused':>8}{'left':>6}"]
    for name, entry in sorted(record["results"].items()):
        left = entry["collected"] - entry["passed"] - len(entry["failed"]) - len(entry["refused"])
        lines.append(f"{name:<34}{entry['passed']:>7}{len(entry['failed']):>7}{len(entry['refused']):>8}{left:>6}")
    lines += [f"  failed: {name}"[:160] for entry in record["results"].values() for name in entry["failed"][:3]]
    return lines


def sanitizer_lines(record: dict) -> list[str]:
    if "absent" in record:
        return [record["absent"]]
    return [f"{done['tool']}: {done['result']}" for done in record["runs"]]


def bench_lines(record: dict) -> list[str]:
    ceilings = record["ceilings"]
    lines = [f"ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 {ceilings['bfloat16_tflop_s']:.1f} TFLOP/s, "
             f"int8 {ceilings['int8_tflop_s']:.1f} TOP/s"]
    for row in record["cases"]:
        if "error" in row:
            lines.append(f"{row['name']}: FAILED, {row['error'][:90]}")
            continue
        backends = "+".join(sorted(set(row.get("backends", {}).values())))
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
        lines.append(f"{row['name']} [{backends}]: {row['timings']['triskele']['median_ms']:.4g} ms, "
                     f"{row['of_floor']:.0%} of floor; {ratios}"[:240])
        lines += [f"  {name} {why}"[:160] for name, why in row["absent"].items() if name.startswith("triskele ")]
    absent = {name: why for row in record["cases"] if "error" not in row for name, why in row["absent"].items()
              if not name.startswith("triskele ")}
    if absent:
        lines.append("absent peers: " + "; ".join(f"{name} ({why[:60]})" for name, why in absent.items()))
    if record.get("left_out"):
        lines.append(f"out of time, not measured: {len(record['left_out'])} cases")
    return lines


def blocks_lines(record: dict) -> list[str]:
    lines = []
    for row in record["rows"]:
        said = f"FAILED, {row['error'][:90]}" if "error" in row else f"{row['ms']:.4g} ms, {row['ratio']:.2f}x"
        lines.append(f"{row['model']}, {row['arm']}: {said}")
    return lines + [f"{name}: out of time" for name in record["left_out"]]


WANTED = (("Duration", "time"), ("Compute (SM) Throughput", "SM"), ("DRAM Throughput", "DRAM"),
          ("Registers Per Thread", "registers"), ("Achieved Occupancy", "occupancy"))


def ncu_lines(record: dict) -> list[str]:
    lines = []
    for launch in record["launches"]:
        by_name = {name.split(", ", 1)[1]: value for name, value in launch["counters"].items()}
        said = ", ".join(f"{short} {by_name[name]}" for name, short in WANTED if name in by_name)
        lines.append(f"{launch['kernel'][:60]}: {said}")
    return lines or ["no launch was profiled"]


PARTS = {"bench": bench_lines, "blocks": blocks_lines, "ncu": ncu_lines, "sanitizer": sanitizer_lines,
         "tests": tests_lines}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    for name, lines in PARTS.items():
        record = _record(folder, name)
        print(f"--- {name}")
        print("\n".join(lines(record)) if record is not None else "not run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
