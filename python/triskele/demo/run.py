"""Runs a scene's variants on the same seed and measures each: time, memory, rounds, fidelity."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

import numpy as np

import triskele as tk
from triskele.metrics import psnr, ssim


@dataclass
class Row:
    """One measured variant. seconds: of one call, after a warm-up call of two steps; ratio: plain / this."""

    scene: str
    name: str
    note: str
    seconds: float
    ratio: float
    weight_mb: float
    rounds: int
    rows: int  # denoiser evaluations a sample, guidance's second one not counted
    psnr: float
    ssim: float
    accuracy: float | None
    summary: str = ""
    pictures: np.ndarray | None = field(default=None, repr=False)
    history: list = field(default_factory=list, repr=False)  # of the sampler's first sample: a dict a round

    def to_record(self) -> dict:
        """What the JSON record holds: everything but the pictures and the history."""
        values = asdict(self)
        return {k: v for k, v in values.items() if k not in ("pictures", "history", "summary")}


def denoiser(pipe):
    """The module that a pipeline's loop calls."""
    return pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet


def weight_megabytes(module) -> float:
    """Parameters and buffers, in 10^6 bytes."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def run_variant(scene, variant, seed: int, plain: Row | None) -> Row:
    """Generate with one variant. `plain` is the row to compare with, None for the plain pipeline itself."""
    pipe = scene.load(variant.load)
    handle = tk.patch(pipe, **variant.arms) if variant.arms else None
    sampler = handle.sampler if handle is not None else None
    scene.call(pipe, seed, 2)
    start = time.perf_counter()
    pictures = scene.call(pipe, seed, scene.steps)
    seconds = time.perf_counter() - start
    runs = list(sampler.last) if sampler is not None else []
    row = Row(
        scene=scene.key, name=variant.name, note=variant.note, seconds=seconds,
        ratio=1.0 if plain is None else plain.seconds / seconds,
        weight_mb=weight_megabytes(denoiser(pipe)),
        rounds=max((run.iterations for run in runs), default=scene.steps),
        rows=max((run.nfe for run in runs), default=scene.steps),
        psnr=float("inf") if plain is None else psnr(pictures, plain.pictures),
        ssim=1.0 if plain is None else ssim(pictures, plain.pictures),
        accuracy=scene.accuracy(pictures) if scene.accuracy else None,
        summary=str(handle.summary()) if handle is not None else "",
        pictures=pictures,
        history=list(getattr(runs[0], "history", [])) if runs else [],
    )
    if handle is not None:
        handle.restore()
    return row


def run_scene(scene, seed: int, progress) -> list[Row]:
    """All variants of a scene; `progress(name)` is called before each."""
    rows: list[Row] = []
    for variant in scene.variants:
        progress(f"{scene.key}: {variant.name}")
        rows.append(run_variant(scene, variant, seed, rows[0] if rows else None))
    return rows
