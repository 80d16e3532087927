"""The demo's figures, as PNG or animated WebP data URIs that a self-contained page can hold."""

from __future__ import annotations

import base64
import io

import numpy as np

INK, MUTED = "#1f2933", "#7b8794"
COLORS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e")


def data_uri(payload: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(payload).decode()}"


def _upscaled(pictures: np.ndarray, side: int) -> np.ndarray:
    """uint8 [..., H, W, 3], enlarged by a whole factor (nearest neighbour) to about `side` pixels."""
    values = np.clip(np.nan_to_num(pictures) * 255 + 0.5, 0, 255).astype(np.uint8)
    if values.shape[-1] == 1:
        values = np.repeat(values, 3, axis=-1)
    factor = max(1, side // values.shape[-2])
    return values.repeat(factor, axis=-3).repeat(factor, axis=-2)


def tiled(pictures: np.ndarray, columns: int, gap: int = 4) -> np.ndarray:
    """[N, ..., H, W, C] -> one picture [..., rows*H, columns*W, C] on a white ground."""
    count, height, width = len(pictures), *pictures.shape[-3:-1]
    rows = -(-count // columns)
    shape = (*pictures.shape[1:-3], rows * (height + gap) - gap, columns * (width + gap) - gap, pictures.shape[-1])
    sheet = np.full(shape, 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[..., y:y + height, x:x + width, :] = picture
    return sheet


def image_sheet(pictures: np.ndarray, columns: int, side: int = 64) -> str:
    """Pictures [N, H, W, C] in [0, 1] side by side, as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tiled(_upscaled(pictures, side), columns)).save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "png")


def animation(videos: np.ndarray, fps: int, side: int = 128) -> str:
    """Videos [N, T, H, W, C] in [0, 1] side by side, as an animated WebP that loops."""
    from PIL import Image

    sheet = tiled(_upscaled(videos, side), len(videos))
    frames = [Image.fromarray(frame) for frame in sheet]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0, lossless=True)
    return data_uri(buffer.getvalue(), "webp")


def film_strip(video: np.ndarray, count: int = 8, side: int = 64) -> str:
    """Some frames of one video [T, H, W, C], evenly spaced, as a PNG: what a page that cannot move shows."""
    picked = np.linspace(0, len(video) - 1, count).round().astype(int)
    return image_sheet(video[picked], count, side)


def _figure(width=5.6, height=3.3):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), dpi=130)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8)
    return figure, axes


def _finish(figure, axes, x_label, y_label) -> str:
    from matplotlib import pyplot as plt

    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return data_uri(buffer.getvalue(), "png")


def convergence(histories: dict[str, list[dict]], steps: int) -> str:
    """Worst unconverged residual (log) after each round, one line a run; dotted: where sequential sampling ends."""
    figure, axes = _figure()
    for color, (name, history) in zip(COLORS, histories.items()):
        rounds = range(1, len(history) + 1)
        axes.semilogy(rounds, [max(h["residual"], 1e-12) for h in history], color=color, marker="o", markersize=3,
                      label=name)
    axes.axvline(steps, color=MUTED, linestyle=":", linewidth=1)
    axes.annotate("sequential: one step a round", (steps, axes.get_ylim()[1]), ha="right", va="top", fontsize=8,
                  color=MUTED, xytext=(-4, 0), textcoords="offset points")
    return _finish(figure, axes, "round (one batched call of the denoiser)", "largest residual in the window")


def quality_curves(curves: dict[str, list[tuple[float, float]]], x_label: str, y_label="PSNR against plain, dB",
                   labels: dict[str, list[str]] | None = None) -> str:
    """Lines through (x, y) points, with an optional text at each point."""
    figure, axes = _figure()
    for color, (name, points) in zip(COLORS, curves.items()):
        finite = [(x, y) for x, y in points if np.isfinite(y)]
        axes.plot(*zip(*finite), color=color, marker="o", markersize=4, label=name)
        for (x, y), text in zip(finite, (labels or {}).get(name, [])):
            axes.annotate(text, (x, y), fontsize=7, color=MUTED, xytext=(3, 4), textcoords="offset points")
    return _finish(figure, axes, x_label, y_label)


def overview(title: str, rows: list[tuple[str, str, np.ndarray]], path) -> None:
    """One PNG file with a line a variant: (name, figures, pictures [N, H, W, C] in [0, 1]). The README's picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(len(rows), 1, figsize=(9.4, 0.62 * len(rows) + 0.4), dpi=150, squeeze=False)
    for axes, (name, figures, pictures) in zip(grid[:, 0], rows):
        axes.imshow(tiled(_upscaled(pictures, 64), len(pictures)), interpolation="nearest")
        axes.set_axis_off()
        axes.text(-0.02, 0.66, name, transform=axes.transAxes, ha="right", va="center", fontsize=8.5, color=INK,
                  fontweight="bold")
        axes.text(-0.02, 0.30, figures, transform=axes.transAxes, ha="right", va="center", fontsize=8, color=MUTED)
    figure.suptitle(title, fontsize=10, color=INK, x=0.99, ha="right")
    figure.subplots_adjust(left=0.34, right=0.99, top=1 - 0.35 / (0.62 * len(rows) + 0.4), bottom=0.01, hspace=0.12)
    figure.savefig(path)
    plt.close(figure)
