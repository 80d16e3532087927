"""The `triskele demo` command: runs the scenes, prints the table, writes the page and the record."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from triskele import machine, report
from triskele.checks import expected
from triskele.demo import plots
from triskele.demo.run import Row, run_scene

HEADER = ["", "seconds", "ratio", "weights, MB", "rounds", "denoiser rows", "PSNR, dB", "SSIM", "recognised"]


def demo(args) -> int:
    """Runs what the arguments of cli.py ask for. Returns the exit code."""
    from diffusers.utils import logging as diffusers_logging
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    out = Path(args.out)
    logging.getLogger("triskele").setLevel(logging.ERROR)  # "sequential is faster here" is what the table is about
    diffusers_logging.disable_progress_bar()  # of loading: one bar is enough
    scenes = _scenes(args)
    if args.quick:
        scenes = [replace(scene, steps=min(scene.steps, 4)) for scene in scenes]
    curves = not args.quick and args.model is None
    console = Console() if sys.stdout.isatty() else Console(width=132)
    start = time.perf_counter()
    total = sum(len(scene.variants) for scene in scenes) + (len(scenes) if curves else 0)
    rows, sections = [], []
    with Progress(TextColumn("{task.description:<58}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                  TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("loading", total=total)
        done = -1

        def progress(name: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, description=name, completed=done)

        for scene in scenes:
            found = run_scene(scene, args.seed, progress)
            rows += found
            sections.append(_scene_section(scene, found))
            if curves:
                progress(f"{scene.key}: quality curves")
                _add_curves(scene, sections[-1], args.seed, lambda text: bar.update(task, description=text))
            _add_strip(sections[-1], found)
        bar.update(task, description="done", completed=total)
    record = {"kind": "demo", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seed": args.seed,
              "quick": args.quick, "machine": machine.describe(), "rows": [row.to_record() for row in rows]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(_finite(record), indent=1) + "\n")
    where = record["machine"]
    lead = (f"{where.get('gpu', where['cpu'])}, {where['cores']} threads, torch {where['torch']}, kernels "
            f"{where['kernel_level']}, commit {where['commit']}, {record['when'][:10]}. The same seed in every row. "
            + ("A quick check with few steps: its figures are no measurement. " if args.quick else ""))
    for scene in scenes:
        _write_overview(out / f"{scene.key}.png", scene, [row for row in rows if row.scene == scene.key])
    path = report.write_page(out / "index.html", "triskele: the same pictures, faster", lead, sections)
    for scene in scenes:
        console.print(_console_table(scene.title, [row for row in rows if row.scene == scene.key]))
    console.print(f"page: {path}   record: {out / 'demo.json'}   {time.perf_counter() - start:.0f} s in all")
    return 0


def _scenes(args):
    from triskele.demo import scenes

    if args.model is not None:
        return [scenes.user_scene(args.model, args.prompt, args.steps, args.device, _call_arguments(args.call))]
    known = {"image": scenes.image_scene, "video": scenes.video_scene}
    chosen = args.scenes.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise expected("--scenes", "image, video or both", ",".join(unknown))
    return [known[name]() for name in chosen]


def _call_arguments(pairs: list[str]) -> dict:
    """["height=256", "guidance_scale=4.5"] -> {"height": 256, "guidance_scale": 4.5}."""
    values = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found:
            raise expected("--call", "NAME=VALUE", repr(pair))
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


def _cells(row: Row) -> list[str]:
    return [row.name, f"{row.seconds:.2f}", f"{row.ratio:.2f}×", f"{row.weight_mb:.2f}", str(row.rounds), str(row.rows),
            report.decibel(row.psnr), f"{row.ssim:.3f}", "" if row.accuracy is None else f"{row.accuracy:.0%}"]


def _console_table(title: str, rows: list[Row]):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _scene_section(scene, rows: list[Row]) -> report.Section:
    import html

    cells = []
    for row in rows:
        line = [html.escape(cell) for cell in _cells(row)]
        line[2] = report.ratio_cell(row.ratio)
        cells.append(line)
    moving = rows[0].pictures.ndim == 5
    pictures = []
    for row in rows:
        caption = f"{row.note + ': ' if row.note else ''}{row.seconds:.2f} s, {report.decibel(row.psnr)} dB" if (
            row is not rows[0]) else f"{row.seconds:.2f} s"
        uri = plots.animation(row.pictures, scene.frames_per_second) if moving else plots.image_sheet(
            row.pictures, columns=min(10, len(row.pictures)), side=96)
        pictures.append(report.Picture(uri, row.name, caption, sharp=True))
    text = ("Every row starts from the same noise. Ratio: the plain pipeline's seconds over this row's; a figure below "
            "one is slower. Rounds: calls of the denoiser one after another; rows: timesteps evaluated a sample.")
    if any(row.rows > row.rounds for row in rows):
        text += (" Parallel sampling trades more rows for fewer rounds: on a processor that one row already fills, "
                 "as here, it is slower; it pays where one row leaves the device idle.")
    section = report.Section(scene.title, text, [(HEADER, cells)], pictures)
    histories = {row.name: row.history for row in rows if row.history}
    if histories:
        section.pictures.append(report.Picture(
            plots.convergence(histories, scene.steps), "Convergence", "of the first sample's parallel sampling"))
    section.details = [(f"what was replaced: {row.name}", row.summary) for row in rows if row.summary]
    return section


def _write_overview(path: Path, scene, rows: list[Row]) -> None:
    lines = []
    for row in rows:
        pictures = row.pictures
        if pictures.ndim == 5:  # one video, evenly spaced frames
            pictures = pictures[0][np.linspace(0, pictures.shape[1] - 1, 12).round().astype(int)]
        figures = f"{row.seconds:.1f} s, {row.weight_mb:.1f} MB" + (
            "" if row is rows[0] else f", {row.ratio:.2f}×, {report.decibel(row.psnr)} dB")
        lines.append((row.name, figures, pictures[:12]))
    plots.overview(scene.title, lines, path)


def _add_strip(section: report.Section, rows: list[Row]) -> None:
    """The sample after some rounds of the first parallel run: how it comes out of the noise."""
    row = next((row for row in rows if any(h.get("sample") is not None for h in row.history)), None)
    if row is None:
        return
    states = [h["sample"] for h in row.history if h.get("sample") is not None]
    picked = [states[i] for i in np.unique(np.linspace(0, len(states) - 1, 10).round().astype(int))]
    stack = np.stack([_displayable(state) for state in picked])
    section.pictures.append(report.Picture(
        plots.image_sheet(stack, len(stack), 96), "The sample after each round",
        f"{row.name}: state 0 of the first sample, rounds 1 to {len(states)}", sharp=True, wide=True))


def _displayable(state) -> np.ndarray:
    """A latent [C, (T,) H, W] of a model that works on pixels -> [H, W, C] in [0, 1], a video's middle frame."""
    array = np.asarray(state, dtype=np.float64)
    if array.ndim == 4:
        array = array[:, array.shape[1] // 2]
    return np.clip(array.transpose(1, 2, 0) / 2 + 0.5, 0, 1)


def _add_curves(scene, section: report.Section, seed: int, progress) -> None:
    from triskele.demo import curves
    from triskele.demo.scenes import fine_tuned_sla

    if scene.key == "video":
        found = curves.sparsity(scene, fine_tuned_sla(), seed, progress)
        section.pictures.append(report.Picture(
            plots.quality_curves(found, "blocks left out, %"), "Quality against sparsity",
            f"{curves.CURVE_STEPS} steps; both against the plain pipeline"))
    else:
        found, labels = curves.bits(scene, seed, progress)
        section.pictures.append(report.Picture(
            plots.quality_curves(found, "stored bits a weight", labels=labels), "Quality against bits",
            f"{curves.CURVE_STEPS} steps; r: rank of the low-rank branch"))


def _finite(value):
    """JSON has no infinity: an identical picture's PSNR becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
