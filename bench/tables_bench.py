"""Markdown from the record of bench/run.py: a section a group, the README's summary, peers that are absent."""

from __future__ import annotations

import json
from pathlib import Path

from calm import CALM, noisy
from tables import where

NOTES = Path(__file__).parent / "results" / "notes.json"
"""case name -> why its target is missed: the one part of the pages that is written by hand."""


def bench_table(record: dict, scene: str | None = None) -> str:
    """scene: a group; "summary": the README's rows; "machine": hardware, ceilings and absent peers; None: all cases."""
    if scene == "machine":
        return machine_lines(record)
    if scene == "summary":
        return summary_table(record)
    cases = [case for case in record["cases"] if scene in (None, case["group"])]
    if not cases:
        return "*Not in the record.*"
    return "\n".join([*case_rows(cases), *noise_lines(cases), *missed_lines(cases), "", where(record)])


def case_rows(cases: list[dict]) -> list[str]:
    """A row a case: our milliseconds, the floor, the ratio to every peer, and whether the targets are met."""
    lines = ["| case | ms | spread | floor, ms | of the floor | against the peers | target |",
             "|---|--:|--:|--:|--:|---|---|"]
    for case in cases:
        if "error" in case:
            lines.append(f"| {case['name']} | failed | | | | {case['error'].replace('|', '/')} | |")
            continue
        own = case["timings"]["triskele"]
        peers = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in case["ratios"].items())
        lines.append(f"| {case['name']} | {own['median_ms']:.2f} | {own['spread']:.0%}{flag(case)} | "
                     f"{max(case['floor'].values()):.2f} | {case['of_floor']:.0%} | {peers} | {targets_cell(case)} |")
    return lines


def flag(case: dict) -> str:
    return ", **noisy**" if noisy(case) else ""


def noise_lines(cases: list[dict]) -> list[str]:
    """Which rows are no quiet record, and by whose spread."""
    found = [f"{case['name']} ({noisy(case)})" for case in cases if "error" not in case and noisy(case)]
    said = f"Noisy, with a spread above {CALM:.0%} of ours or of a target's peer: {'; '.join(found)}."
    return ["", said] if found else []


def targets_cell(case: dict) -> str:
    """"10× sdpa: met", a target a peer."""
    return ", ".join(f"{target:g}× {peer}: {verdict(case, peer)}" for peer, target in case["targets"].items())


def verdict(case: dict, peer: str) -> str:
    ratio = case["ratios"].get(peer)
    return "not measured" if ratio is None else "met" if ratio >= case["targets"][peer] else "missed"


def missed_lines(cases: list[dict]) -> list[str]:
    """The targets that are not reached, each with its cause from notes.json."""
    notes = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    lines = []
    for case in cases:
        short = [f"{case['ratios'][peer]:.2f}× of {case['targets'][peer]:g}× ({peer})"
                 for peer in case.get("targets", {}) if verdict(case, peer) == "missed"]
        if short:
            lines.append(f"- {case['name']}: {', '.join(short)}. {notes.get(case['name'], 'No cause noted yet.')}")
    return ["", "Missed:", "", *lines] if lines else []


def summary_table(record: dict) -> str:
    """The cases that have a label, against the peers of their targets."""
    lines = ["| | ms | against (target) |", "|---|--:|---|"]
    for case in record["cases"]:
        if case.get("label"):
            against = ", ".join(f"{case['ratios'][peer]:.2f}× {peer} ({target:g}×)"
                                for peer, target in case["targets"].items() if peer in case["ratios"])
            own = case["timings"]["triskele"]["median_ms"]
            lines.append(f"| {case['label']} | {own:.2f}{flag(case)} | {against} |")
    return "\n".join([*lines, "", where(record)])


def machine_lines(record: dict) -> str:
    machine, ceilings = record["machine"], record["ceilings"]
    absent = {name: why for case in record["cases"] for name, why in case.get("absent", {}).items()}
    rows = {"hardware": machine.get("gpu", machine["cpu"]), "threads": machine["cores"],
            "instruction sets": machine.get("cpu_features", ""), "kernels": machine["kernel_level"],
            "driver": machine.get("driver", ""),
            "versions": f"Python {machine.get('python', '')}, torch {machine['torch']}",
            "commit": machine["commit"] + (" (with changes that are not committed)" if machine.get("dirty") else ""),
            "copy, read + write": f"{ceilings['copy_gb_s']:.1f} GB/s"}
    rows |= {f"matrix product, {unit}": f"{ceilings[f'{unit}_tflop_s']:.2f} TFLOP/s"
             for unit in ("float32", "bfloat16", "int8") if f"{unit}_tflop_s" in ceilings}
    rows["when"] = record["when"]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value != "")]
    lines += ["", "Absent peers: " + ("; ".join(f"{name} ({why})" for name, why in sorted(absent.items())) or "none")
              + "."]
    failed = [case["name"] for case in record["cases"] if "error" in case]
    return "\n".join([*lines, *(["", f"Failed cases: {', '.join(failed)}."] if failed else [])])
