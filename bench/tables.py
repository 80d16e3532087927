"""Markdown tables from the records of the demo, the digit models and the long clip."""

from __future__ import annotations

import math

from calm import CALM

HEADER = "| | seconds | against plain | weights, MB | rounds | denoiser rows | PSNR, dB | SSIM | recognised |"


def where(record: dict) -> str:
    """The line below a table: hardware, versions, commit, day."""
    machine = record["machine"]
    return (f"<sub>{machine.get('gpu', machine['cpu'])}, {machine['cores']} threads, torch {machine['torch']}, "
            f"kernels {machine['kernel_level']}, commit {machine['commit']}, {record['when'][:10]}</sub>")


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
    return "\n".join([*lines, "", where(record)])


def distill_table(record: dict) -> str:
    """PSNR to the teacher after each stage of a distillation."""
    lines = ["| | PSNR to the teacher, dB |", "|---|--:|"]
    lines += [f"| {stage} | {value:.1f} |" for stage, value in record["psnr"].items()]
    return "\n".join([*lines, "", where(record)])


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
    return "\n".join([*lines, "", where(record)])


def scales_table(record: dict) -> str:
    """Output errors with amax and integer scales: random weights, and the digit models' linears by their ratio."""
    size = f"{record['rows']} × {record['columns']}"
    lines = [f"| error, amax → integer; weights {size}, rank 32 | exact activations | int8 | exact, calibrated "
             "| int8, calibrated |", "|---|--:|--:|--:|--:|"]
    for name in dict.fromkeys(row["weight"] for row in record["random"]):
        rows = sorted((row for row in record["random"] if row["weight"] == name), key=lambda row: row["calibrated"])
        cells = [f"{row['amax'][kind]:.2%} → {row['integer'][kind]:.2%}" for row in rows for kind in ("exact", "int8")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| error with integer scales over error with amax | linears | geometric mean | smallest | largest |",
              "|---|--:|--:|--:|--:|"]
    for name in dict.fromkeys(row["model"] for row in record["models"]):
        for calibrated in (False, True):
            ratios = [row["integer"]["int8"] / row["amax"]["int8"] for row in record["models"]
                      if row["model"] == name and row["calibrated"] == calibrated]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(f"| digits, {name}{', calibrated' * calibrated} | {len(ratios)} | {mean:.3f} | "
                         f"{min(ratios):.3f} | {max(ratios):.3f} |")
    ranks = list(dict.fromkeys(row["rank"] for row in record["whole"]))
    lines += ["", f"| error of the whole transformer, amax → integer | {' | '.join(f'rank {r}' for r in ranks)} |",
              "|---|" + "--:|" * len(ranks)]
    for name in dict.fromkeys(row["model"] for row in record["whole"]):
        cells = [f"{row['amax']:.2%} → {row['integer']:.2%}" for row in record["whole"] if row["model"] == name]
        lines.append(f"| digits, {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", where(record)])


def end_to_end_table(record: dict, scene: str | None) -> str:
    """scene "line": one sentence for the README; otherwise the table of each clip, and the profile."""
    if scene == "line":
        return _end_to_end_line(record)
    lines = []
    for clip in record["clips"]:
        lines += [f"**{clip['frames']} frames, {clip['tokens']:,} tokens, {clip['steps']} steps with guidance**", "",
                  "| | dtype | seconds | against plain | PSNR to plain, dB | SSIM |", "|---|---|--:|--:|--:|--:|"]
        for row in clip["rows"]:
            quality = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
            note = f" ({row['note']})" if row["note"] else ""
            flag = ", **noisy**" if row.get("spread", 0.0) > CALM else ""
            lines.append(f"| {row['name']}{note} | {row['dtype']} | {row['seconds']:.2f}{flag} | {row['ratio']:.2f}× | "
                         f"{quality} | {row['ssim']:.3f} |")
        lines.append("")
    profiled = [row for row in record["clips"][0]["rows"] if "profile_ms" in row]
    if profiled:
        groups, tokens = list(profiled[0]["profile_ms"]), record["clips"][0]["tokens"]
        lines += [f"Where one forward of the transformer spends its time, ms ({tokens:,} tokens):",
                  "", "| | dtype | " + " | ".join(groups) + " | sum |", "|---|---|" + "--:|" * (len(groups) + 1)]
        for row in profiled:
            times = row["profile_ms"]
            lines.append(f"| {row['name']} | {row['dtype']} | " + " | ".join(f"{times[g]:.0f}" for g in groups)
                         + f" | {sum(times.values()):.0f} |")
        lines.append("")
    return "\n".join([*lines, where(record)])


def _end_to_end_line(record: dict) -> str:
    clip = record["clips"][0]
    both = [row for row in clip["rows"] if row["dtype"] == "float32" and "W4A8" in row["name"]]
    best = max(both, key=lambda row: row["ratio"])
    plain = next(row for row in clip["rows"] if row["name"] == "plain" and row["dtype"] == best["dtype"])
    note = f", {best['note']}" if best["note"] else ""
    alone = max((row for row in clip["rows"] if row["dtype"] == best["dtype"] and row["ratio"] > best["ratio"]
                 and "W4A8" not in row["name"]), key=lambda row: row["ratio"], default=None)
    faster = "" if alone is None else f" {alone['name']} alone is faster: {alone['seconds']:.1f} s, " \
        f"{alone['ratio']:.2f}×, {alone['psnr']:.1f} dB."
    return (f"The video model at {clip['tokens']:,} tokens ({clip['frames']} frames, {clip['steps']} steps): "
            f"{plain['seconds']:.1f} s plain, {best['seconds']:.1f} s with {best['name']}{note}, "
            f"{best['ratio']:.2f}×; {best['psnr']:.1f} dB to plain.{faster}\n\n{where(record)}")
