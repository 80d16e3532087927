"""The curves of a record of bench/run.py, as SVG files that name the record they were drawn from."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

COLORS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#c2255c", "#7b8794")
INK, MUTED = "#1f2933", "#7b8794"
LOGARITHMIC = ("length", "M", "latent", "keep", "density")
X_LABELS = {"length": "tokens", "keep": "blocks kept, %", "density": "chunks attended to, %", "M": "rows M",
            "head_dim": "head_dim", "backward": "tokens", "latent elements": "elements of a latent"}


def curves(record: dict) -> dict[str, list[dict]]:
    """Plot name -> its cases along the axis; those with two points and more."""
    found: dict[str, list[dict]] = {}
    for case in record["cases"]:
        for name, x in case.get("curves", {}).items():
            found.setdefault(name, []).append(case | {"x": x})
    return {name: sorted(cases, key=lambda case: case["x"]) for name, cases in found.items() if len(cases) > 1}


def file_name(curve: str) -> str:
    return re.sub(r"\W+", "-", curve).strip("-") + ".svg"


def digest(cases: list[dict]) -> str:
    """Of what a plot shows."""
    shown = [(case["x"], {k: t["median_ms"] for k, t in case["timings"].items()}, case["floor"]) for case in cases]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def stale(record: dict, folder: Path) -> list[str]:
    """Plots that are missing or were drawn from other figures."""
    return [file_name(name) for name, cases in curves(record).items()
            if not (folder / file_name(name)).exists() or digest(cases) not in (folder / file_name(name)).read_text()]


def draw(record: dict, folder: Path) -> list[Path]:
    """Write every plot of the record whose figures have changed; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    old = stale(record, folder)
    return [_draw(name, cases, folder / file_name(name)) for name, cases in curves(record).items()
            if file_name(name) in old]


def _draw(name: str, cases: list[dict], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "triskele", "svg.fonttype": "none"}  # the same figures, the same file
    figure, (times, ratios) = plt.subplots(1, 2, figsize=(8.4, 3.1))
    peers = list(dict.fromkeys(peer for case in cases for peer in case["timings"] if peer != "triskele"))
    for color, peer in zip(COLORS, ["triskele", *peers]):
        points = [(case["x"], case["timings"][peer]["median_ms"]) for case in cases if peer in case["timings"]]
        times.plot(*zip(*points), color=color, marker="o", markersize=3.5, label=peer)
        if peer != "triskele":
            points = [(case["x"], case["ratios"][peer]) for case in cases if peer in case["ratios"]]
            ratios.plot(*zip(*points), color=color, marker="o", markersize=3.5, label=peer)
    times.plot([case["x"] for case in cases], [max(case["floor"].values()) for case in cases], color=MUTED,
               linestyle=":", label="floor")
    ratios.axhline(1, color=MUTED, linewidth=0.8)
    axis = name.split(",")[0]
    ticks = [case["x"] for case in cases]
    for axes, label in ((times, "milliseconds"), (ratios, "× faster than the peer")):
        if axis.startswith(LOGARITHMIC) or axis == "backward":
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7, color=MUTED)
        axes.minorticks_off()
        axes.set_xlabel(X_LABELS.get(axis, axis), fontsize=8, color=INK)
        axes.set_ylabel(label, fontsize=8, color=INK)
        axes.tick_params(axis="y", labelsize=7, colors=MUTED)
        axes.grid(color="#e4e7eb", linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    times.set_yscale("log")
    ratios.set_ylim(bottom=0)
    times.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{cases[0]['group']}: {name}", fontsize=9, color=INK, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Description": digest(cases)})
    plt.close(figure)
    return path
