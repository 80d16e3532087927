"""Renders the tables of README.md and docs, and the plots, from the records under bench/results/.

    python bench/render.py            # rewrite tables and plots
    python bench/render.py --check    # exit 1 where one differs from what its record says

No figure is typed by hand. A table stands between `<!-- record: PATH scene=NAME -->` and `<!-- end -->`; where the
record is not there yet, the page says so. A PATH with a `*` is that record of every GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import plots
from tables import demo_table, digits_table, distill_table, end_to_end_table, scales_table
from tables_bench import bench_table
from tables_gpu import gpu_tables

ROOT = Path(__file__).parent.parent
CURVES = Path("bench/results/cpu/curves.json")
PLOTS = Path("docs/plots")
MARK = re.compile(r"<!-- record: (?P<path>\S+)(?: scene=(?P<scene>\w+))? -->\n.*?<!-- end -->", re.DOTALL)
NO_RECORD = "*No record yet; `make bench` leaves it.*"
NO_GPU_RECORD = "*No record yet; `make gpu` leaves it.*"


def plot_lines(record: dict) -> str:
    """A picture a curve."""
    return "\n\n".join(f"![{name}](plots/{plots.file_name(name)})" for name in plots.curves(record)) or NO_RECORD


def _bench(record: dict, scene: str | None) -> str:
    return plot_lines(record) if scene == "plots" else bench_table(record, scene)


TABLES = {"demo": demo_table, "bench": _bench, "end_to_end": end_to_end_table,
          "digits": lambda record, _: digits_table(record), "distill": lambda record, _: distill_table(record),
          "scales": lambda record, _: scales_table(record)}


def _record(path: Path) -> dict | None:
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record.get("quick") or record.get("dry"):
        raise ValueError(f"{path.relative_to(ROOT)} is a quick check, not a measurement")
    return record


def rendered(text: str) -> str:
    """`text` with every marked table made anew from its record."""

    def table(match: re.Match) -> str:
        if "*" in match["path"]:
            found = [_record(path) for path in sorted(ROOT.glob(match["path"]))]
            made = gpu_tables(found) if found else NO_GPU_RECORD
        else:
            record = _record(ROOT / match["path"])
            made = NO_RECORD if record is None else TABLES[record["kind"]](record, match["scene"])
        opening = match[0].split("\n", 1)[0]
        return f"{opening}\n{made}\n<!-- end -->"

    return MARK.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = rendered(old)
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    if record := _record(ROOT / CURVES):
        stale += plots.stale(record, ROOT / PLOTS)
        if not check:
            plots.draw(record, ROOT / PLOTS)
    if stale:
        print(("differs from its record: " if check else "rendered: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
