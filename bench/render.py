"""Renders the tables of README.md and docs from the records under bench/results/: no figure is typed by hand.

    python bench/render.py            # rewrite the tables
    python bench/render.py --check    # exit 1 where a table differs from what its record says

A table stands between `<!-- record: PATH scene=NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"<!-- record: (?P<path>\S+)(?: scene=(?P<scene>\w+))? -->\n.*?<!-- end -->", re.DOTALL)
HEADER = "| | seconds | against plain | weights, MB | rounds | denoiser rows | PSNR, dB | SSIM | recognised |"


def demo_table(record: dict, scene: str) -> str:
    """The demo's rows of one scene as Markdown, with the hardware and the commit below."""
    lines = [HEADER, "|---|" + "--:|" * 8]
    for row in record["rows"]:
        if row["scene"] != scene:
            continue
        quality = "identical" if row["psnr"] is None else f"{row['psnr']:.1f}"
        recognised = "" if row["accuracy"] is None else f"{row['accuracy']:.0%}"
        note = f" ({row['note']})" if row["note"] and row["note"] not in row["name"] else ""
        lines.append(f"| {row['name']}{note} | {row['seconds']:.2f} | {row['ratio']:.2f}× | {row['weight_mb']:.2f} | "
                     f"{row['rounds']} | {row['rows']} | {quality} | {row['ssim']:.3f} | {recognised} |")
    return "\n".join([*lines, "", _where(record)])


def distill_table(record: dict) -> str:
    """PSNR to the teacher after each stage of a distillation."""
    lines = ["| | PSNR to the teacher, dB |", "|---|--:|"]
    lines += [f"| {stage} | {value:.1f} |" for stage, value in record["psnr"].items()]
    return "\n".join([*lines, "", _where(record)])


def bench_table(record: dict) -> str:
    """A row a case: our milliseconds, the floor, and the ratio to every peer (a target in brackets)."""
    lines = ["| case | ms | floor, ms | of the floor | against the peers (target) |", "|---|--:|--:|--:|---|"]
    for case in record["cases"]:
        peers = ", ".join(
            f"{ratio:.2f}× {name}" + (f" ({case['targets'][name]:g}×)" if name in case["targets"] else "")
            for name, ratio in case["ratios"].items())
        floor = max(case["floor"].values())
        lines.append(f"| {case['name']} | {case['timings']['triskele']['median_ms']:.2f} | {floor:.2f} | "
                     f"{case['of_floor']:.0%} | {peers} |")
    absent = sorted({f"{name} ({why})" for case in record["cases"] for name, why in case["absent"].items()})
    ceilings = record["ceilings"]
    lines += ["", f"Ceilings in the same run: copy {ceilings['copy_gb_s']:.1f} GB/s, float32 "
                  f"{ceilings['float32_tflop_s']:.2f} TFLOP/s, bfloat16 {ceilings['bfloat16_tflop_s']:.2f} TFLOP/s.",
              f"Absent peers: {', '.join(absent) or 'none'}.", "", _where(record)]
    return "\n".join(lines)


def digits_table(record: dict) -> str:
    """What bench/digits_quality.py measured of the shipped models."""
    found, steps, clips = record["found"], record["steps"], record["clips"]
    lines = ["| recognised | measured on | result |", "|---|---|--:|",
             f"| classifier, stills | {found['held_out_scans']} held-out scans | {found['classifier_stills']:.1%} |",
             f"| classifier, video frames | the same, moving, 24 frames each | {found['classifier_frames']:.1%} |",
             f"| image samples | {record['images']} samples, {steps} DDIM steps, guidance 2 | {found['images']:.1%} |"]
    names = {"video": "the video model", "sparse": "the same, sparse and fine-tuned"}
    drawn = f"{clips} clips of 24 frames, {steps} steps"
    lines += [f"| single frames of {name} | {drawn} | {found[key]['recognised']:.1%} |" for key, name in names.items()]
    lines += ["", "| motion, pixels a frame | mean step | median bend | largest step | steps over 3 | clips with one |",
              "|---|--:|--:|--:|--:|--:|"]
    for key, name in {"real": "real clips", **names, "shuffled": "real frames in random order"}.items():
        m = found[key]
        lines.append(f"| {name} | {m['mean_step']:.2f} | {m['median_bend']:.2f} | {m['largest_step']:.1f} | "
                     f"{m['jumps']:.1%} | {m['clips_with_jumps']:.0%} |")
    return "\n".join([*lines, "", _where(record)])


TABLES = {"demo": demo_table, "digits": lambda record, _: digits_table(record),
          "distill": lambda record, _: distill_table(record),
          "bench": lambda record, _: bench_table(record)}


def _where(record: dict) -> str:
    machine = record["machine"]
    return (f"<sub>{machine.get('gpu', machine['cpu'])}, {machine['cores']} threads, torch {machine['torch']}, "
            f"kernels {machine['kernel_level']}, commit {machine['commit']}, {record['when'][:10]}</sub>")


def rendered(text: str) -> str:
    """`text` with every marked table made anew from its record."""

    def table(match: re.Match) -> str:
        path = ROOT / match["path"]
        record = json.loads(path.read_text())
        if record.get("quick"):
            raise ValueError(f"{match['path']} is a quick check, not a measurement")
        opening = match[0].split("\n", 1)[0]
        return f"{opening}\n{TABLES[record['kind']](record, match['scene'])}\n<!-- end -->"

    return MARK.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = rendered(old)
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    if stale:
        print(("differs from its record: " if check else "rendered: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
