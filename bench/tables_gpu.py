"""Markdown from the records of `make gpu`."""

from __future__ import annotations

from tables_bench import flag, missed_lines, noise_lines, targets_cell


def place(record: dict) -> str:
    """Hardware, driver, versions, commit, day."""
    machine = record["machine"]
    return (f"<sub>{machine.get('gpu', machine['cpu'])}, driver {machine.get('driver', 'none')}, torch "
            f"{machine['torch']}, commit {machine['commit']}, {record['when'][:10]}"
            f"{', cut off by its time limit' if record.get('cut_off') else ''}</sub>")


def milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def bench_section(record: dict) -> list[str]:
    """Ceilings, then a row a case: which backend, its time, the floor, every peer; what did not run and why."""
    ceilings = record["ceilings"]
    lines = [f"Measured ceilings: copy {ceilings['copy_gb_s']:,.0f} GB/s, bf16 {ceilings['bfloat16_tflop_s']:,.0f} "
             f"TFLOP/s, int8 {ceilings['int8_tflop_s']:,.0f} TOP/s.", "",
             "| case | backend | ms | floor, ms | of the floor | against | target |", "|---|---|--:|--:|--:|---|---|"]
    for case in record["cases"]:
        if "error" in case:
            lines.append(f"| {case['name']} | | failed | | | {case['error'].replace('|', '/')} | |")
            continue
        backends = ", ".join(sorted(set(case.get("backends", {}).values())))
        ratios = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in case["ratios"].items())
        own = milliseconds(case["timings"]["triskele"]["median_ms"])
        lines.append(f"| {case['name']} | {backends} | {own}{flag(case)} | "
                     f"{milliseconds(max(case['floor'].values()))} | {case['of_floor']:.0%} | {ratios} | "
                     f"{targets_cell(case)} |")
    lines += noise_lines(record["cases"])
    lines += missed_lines([case for case in record["cases"] if "error" not in case])
    absent: dict[str, str] = {}
    for case in record["cases"]:
        absent |= case.get("absent", {})
    if absent:
        lines += ["", "Absent: " + "; ".join(f"{name} ({why})" for name, why in sorted(absent.items())) + "."]
    if record.get("left_out"):
        lines += ["", "Out of time, not measured: " + ", ".join(record["left_out"]) + "."]
    return lines


def tests_section(record: dict) -> list[str]:
    lines = ["| op | backend | passed | failed | refused | worst of it |", "|---|---|--:|--:|--:|---|"]
    for name, entry in sorted(record["results"].items()):
        op, backend = name.split("/")
        first = entry["failed"][0].replace("|", "/") if entry["failed"] else ""
        lines.append(f"| {op} | {backend} | {entry['passed']} | {len(entry['failed'])} | {len(entry['refused'])} | "
                     f"{first} |")
    return lines


def blocks_section(record: dict) -> list[str]:
    lines = ["| model | arm | ms | against plain | the full model, ms (extrapolated) |", "|---|---|--:|--:|--:|"]
    for row in record["rows"]:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['arm']} | failed: {row['error'].replace('|', '/')} | | |")
            continue
        full = f"{row['extrapolated_full_ms']:.1f}" if "extrapolated_full_ms" in row else ""
        model = f"{row['model']}, {row['blocks']} blocks" if "blocks" in row else row["model"]
        lines.append(f"| {model} | {row['arm']} | {milliseconds(row['ms'])} | {row['ratio']:.2f}× | {full} |")
    return lines


def gpu_tables(records: list[dict]) -> str:
    """A table for each record, its machine below."""
    sections = {"bench": bench_section, "gpu_tests": tests_section, "gpu_blocks": blocks_section}
    return "\n\n".join("\n".join([*sections[record["kind"]](record), "", place(record)]) for record in records)
