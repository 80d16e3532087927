"""Writes python/triskele/verified.json from the records of `make gpu`: what `auto` may pick, and where.

    python bench/verify.py            # rewrite it from bench/results/*/tests.json; prints what is verified and what not
    python bench/verify.py --check    # exit 1 where it differs from what the records say

An entry "op/backend": {architecture: record} needs a record of a run on that architecture in which every test of that
op and backend was collected, ran to its end and passed or was refused by the backend, of each kind in `CHECKS`, on
kernels whose sources are those of this tree; and no finding of the sanitizer in the record beside it (sanitizer.json)
may stand against it. Everything else is refused, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gpu_sources

from triskele.backend import VERIFIED

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
CHECKS = ("accuracy", "bits", "graph", "stream")
"""Kinds of test (tests/gpu/test_kernels.py) without which nothing is verified."""


def refused_record(record: dict) -> list[str]:
    """Reasons why a record as a whole verifies nothing."""
    reasons = []
    if record.get("kind") != "gpu_tests":
        return [f"is a record of kind {record.get('kind')!r}, expected 'gpu_tests'"]
    if record["dry"]:
        reasons.append("is a dry run")
    for name in ("gpu", "driver", "commit"):
        if record["machine"].get(name) in (None, "unknown"):
            reasons.append(f"does not name the {name}")
    if not (record["architecture"] or "").startswith("sm"):
        reasons.append(f"is of architecture {record['architecture']!r}")
    return reasons


def refused_entry(entry: dict, name: str, sources: str | None) -> list[str]:
    """Reasons why the results of one op and backend do not verify it. sources: the tree's fingerprint now."""
    reasons = []
    if entry["failed"]:
        reasons.append(f"{len(entry['failed'])} tests failed, such as {entry['failed'][0]}")
    done = entry["passed"] + len(entry["failed"]) + len(entry["refused"])
    if not entry["complete"] or done != entry["collected"]:
        reasons.append(f"{done} of {entry['collected']} tests ran to their end")
    lacking = [check for check in CHECKS if not entry["checks"].get(check)]
    if lacking:
        reasons.append(f"no test of {', '.join(lacking)} passed")
    if entry["sources"] is None:
        reasons.append("the library did not say what it was built from")
    elif entry["sources"] != sources:
        reasons.append("the kernels' sources have changed since")
    return [f"{name}: {reason}" for reason in reasons]


def findings(tests: Path, name: str) -> list[str]:
    """What the sanitizer's record beside a record of tests says against an op and backend. A finding that names none
    stands against all."""
    path = tests.with_name("sanitizer.json")
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    return [f"{name}: {run['tool']} found errors" for run in runs if run["result"] == "errors found"
            and (name in run["blamed"] or not run["blamed"] or "?" in run["blamed"])]


def verified(paths: list[Path]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(what verified.json should hold, the refusals in words)."""
    known = {f"{op}/{backend}": gpu_sources.current(op, backend) for op, backend in gpu_sources.gpu_backends()}
    found: dict[str, dict[str, str]] = {}
    refusals = []
    for path in sorted(paths):
        where = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        record = json.loads(path.read_text())
        if reasons := refused_record(record):
            refusals += [f"{where} {reason}" for reason in reasons]
            continue
        for name, entry in sorted(record["results"].items()):
            if name not in known:
                refusals.append(f"{where}: {name}: no such entry in the backend tables")
            elif reasons := refused_entry(entry, name, known[name]) + findings(path, name):
                refusals += [f"{where}: {reason}" for reason in reasons]
            else:
                found.setdefault(name, {})[record["architecture"]] = where
    return dict(sorted(found.items())), refusals


def text_of(entries: dict) -> str:
    return json.dumps(entries, indent=1, sort_keys=True) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, nargs="*", help="default: bench/results/*/tests.json")
    parser.add_argument("--out", type=Path, default=VERIFIED)
    args = parser.parse_args(arguments)
    paths = sorted(RESULTS.glob("*/tests.json")) if args.records is None else args.records
    entries, refusals = verified(paths)
    print("\n".join(f"refused: {line}" for line in refusals) or "no refusals")
    for name, records in entries.items():
        places = ", ".join(f"{architecture} ({where})" for architecture, where in records.items())
        print(f"verified: {name} on {places}")
    if not entries:
        print("verified: nothing")
    if args.check:
        stale = args.out.read_text() != text_of(entries)
        print(f"{args.out.name} {'differs from' if stale else 'is'} what the records say")
        return 1 if stale else 0
    args.out.write_text(text_of(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
