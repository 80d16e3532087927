"""Quality curves: PSNR against the plain pipeline as sparsity grows, and as weights get fewer bits."""

from __future__ import annotations

from dataclasses import replace

import triskele as tk
from triskele.demo.run import denoiser
from triskele.metrics import psnr

KEEPS = (0.05, 0.1, 0.15, 0.25, 0.5, 1.0)
CURVE_STEPS = 8


def sparsity(scene, config, seed: int, progress) -> dict[str, list[tuple[float, float]]]:
    """PSNR of the video model over the share of blocks that SLA leaves out; its teacher is the plain pipeline."""
    plain = scene.call(scene.load(""), seed, CURVE_STEPS)
    free, tuned = [], []
    tuned_pipe = scene.load("sla")
    for keep in KEEPS:
        progress(f"sparsity {1 - keep:.0%}")
        pipe = scene.load("")
        with tk.patch(pipe, attention=replace(config, keep=keep, linear="none")):
            free.append((100 * (1 - keep), psnr(scene.call(pipe, seed, CURVE_STEPS), plain)))
        for module in denoiser(tuned_pipe).modules():
            if isinstance(module, tk.nn.SparseLinearAttention):
                module.config = replace(module.config, keep=keep)
        tuned.append((100 * (1 - keep), psnr(scene.call(tuned_pipe, seed, CURVE_STEPS), plain)))
    return {"training-free": free, f"fine-tuned at {1 - config.keep:.0%}": tuned}


def bits(scene, seed: int, progress) -> tuple[dict, dict]:
    """PSNR over the stored bits a weight of the quantized linears, one point a rank; and the points' labels."""
    plain_pipe = scene.load("")
    plain = scene.call(plain_pipe, seed, CURVE_STEPS)
    curves, labels = {}, {}
    for activation, name in (("none", "W4A16"), ("int8", "W4A8"), ("int4", "W4A4")):
        points, texts = [], []
        for rank in (0, 8, 16, 32):
            progress(f"{name}, rank {rank}")
            pipe = scene.load("")
            with tk.patch(pipe, linear=tk.SVDQuant(rank=rank, activation=activation)):
                points.append((stored_bits(denoiser(pipe)), psnr(scene.call(pipe, seed, CURVE_STEPS), plain)))
            texts.append(f"r{rank}")
        curves[name], labels[name] = points, texts
    return curves, labels


def stored_bits(model) -> float:
    """8 x bytes of the quantized layers' tensors (bias left out) over the weights that they stand for."""
    stored = weights = 0
    for module in model.modules():
        if isinstance(module, tk.nn.SVDQuantLinear):
            stored += module.memory_bytes()
            weights += module.in_features * module.out_features
    return 8 * stored / weights
