"""Compares two records of bench/run.py, case by case: how the ratio to each peer moved between two commits.

    python bench/compare.py before.json after.json

Ratios to a peer of the same run are compared, not milliseconds: the machine's mood cancels. Exit 1 where one fell by
more than --tolerance (default 0.1).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def moved(before: dict, after: dict) -> list[tuple[str, str, float, float]]:
    """(case, peer, ratio before, ratio after) for what both records hold."""
    old = {case["name"]: case["ratios"] for case in before["cases"]}
    return [(case["name"], peer, old[case["name"]][peer], ratio)
            for case in after["cases"] if case["name"] in old
            for peer, ratio in case["ratios"].items() if peer in old[case["name"]]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1)
    args = parser.parse_args(arguments)
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    where = [f"{r['machine'].get('gpu', r['machine']['cpu'])} at {r['machine']['commit']}" for r in (before, after)]
    print(f"{where[0]}  ->  {where[1]}")
    rows = moved(before, after)
    if not rows:
        parser.error("the two records have no case in common")
    slower = 0
    for case, peer, old, new in rows:
        fell = new < old * (1 - args.tolerance)
        slower += fell
        print(f"{'SLOWER ' if fell else '       '}{case:<64} {peer:<22} {old:6.2f}x -> {new:6.2f}x")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
