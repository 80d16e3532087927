"""The video pipeline at a longer clip, plain diffusers against the arms in one run; leaves a record.

    python bench/end_to_end.py               # bench/results/cpu/end_to_end.json, a few minutes on two cores

The clip is longer than any that the model was trained on (24 frames): the figures are about speed, and the distance to
the plain pipeline at the same settings says how much was changed. Seconds: of a whole call of the pipeline, the
variants taking turns; the profile: of one forward of the transformer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import profile_ops
import torch
from timing import Timing
from tqdm import tqdm

import triskele as tk
from triskele import digits, machine
from triskele.demo.scenes import fine_tuned_sla
from triskele.metrics import psnr, ssim

ROOT = Path(__file__).parent.parent
TOKENS_A_FRAME = 64
PLAIN = "plain"
AGREE = 0.15
"""Spread (of the middle half, over the median) of a variant's turns above which they go on, all variants with them."""
MOST = 6
"""Turns at most."""


@dataclass(frozen=True)
class Variant:
    """One row: the arms on top of the weights `load`, computed in `dtype`; compared with `against`."""

    name: str
    arms: dict = field(default_factory=dict)
    load: str | None = None
    dtype: torch.dtype = torch.float32
    note: str = ""

    @property
    def plain(self) -> bool:
        return not self.arms and self.load is None


def variants() -> list[Variant]:
    """The first of each dtype is the plain pipeline that the others of that dtype are compared with."""
    tuned = fine_tuned_sla()
    free = replace(tuned, linear="none")
    wide = replace(free, keep=0.05, block_q=64, block_k=64)
    w4a8 = tk.SVDQuant(rank=16)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        kept = f"SLA, keep {free.keep:.0%}"
        found += [
            Variant(PLAIN, dtype=dtype),
            Variant(kept, {"attention": free}, dtype=dtype, note="training-free"),
            Variant(f"{kept} + W4A8", {"attention": free, "linear": w4a8}, dtype=dtype, note="training-free"),
            Variant(f"{kept}, fine-tuned + W4A8", {"linear": w4a8}, "sla", dtype, "distilled at 24 frames"),
            Variant("SLA, keep 5%", {"attention": wide}, dtype=dtype, note="training-free"),
            Variant("SLA, keep 5% + W4A8", {"attention": wide, "linear": w4a8}, dtype=dtype, note="training-free"),
        ]
    return found


def prepared(variant: Variant):
    pipe = digits.load_video_pipeline(variant=variant.load, dtype=variant.dtype)
    pipe.set_progress_bar_config(disable=True)
    if variant.arms:
        tk.patch(pipe, **variant.arms)
    return pipe


def generate(pipe, frames: int, steps: int) -> np.ndarray:
    return np.asarray(pipe("3", num_frames=frames, num_inference_steps=steps, guidance_scale=3.0,
                           generator=torch.Generator().manual_seed(0), output_type="np").frames)


def spread(seconds: list[float]) -> float:
    return Timing.of(seconds).spread


def measure(chosen: list[Variant], frames: int, steps: int, turns: int, profiled: bool) -> dict:
    """One clip length: a row a variant, all of them taking turns, at least `turns`, at most `MOST` until they agree."""
    pipes = [prepared(variant) for variant in tqdm(chosen, desc="loading", leave=False)]
    seconds: list[list[float]] = [[] for _ in chosen]
    clips: list[np.ndarray | None] = [None] * len(chosen)
    for pipe in tqdm(pipes, desc="warming up", leave=False):
        generate(pipe, frames, 1)
    with tqdm(desc=f"{frames} frames") as bar:
        while len(seconds[0]) < turns or (max(map(spread, seconds)) > AGREE and len(seconds[0]) < MOST):
            for i, pipe in enumerate(pipes):
                start = time.perf_counter()
                clips[i] = generate(pipe, frames, steps)
                seconds[i].append(time.perf_counter() - start)
                bar.update()
    rows = []
    for i, variant in enumerate(chosen):
        base = next(j for j, other in enumerate(chosen) if other.plain and other.dtype == variant.dtype)
        row = {"name": variant.name, "note": variant.note, "dtype": str(variant.dtype)[6:],
               "seconds": statistics.median(seconds[i]), "all_seconds": seconds[i], "spread": spread(seconds[i]),
               "ratio": statistics.median(seconds[base]) / statistics.median(seconds[i]),
               "psnr": None if variant.plain else psnr(clips[i], clips[base]),
               "ssim": 1.0 if variant.plain else ssim(clips[i], clips[base])}
        if profiled:
            row["profile_ms"] = profile_ops.of_module(pipes[i].transformer, lambda i=i: generate(pipes[i], frames, 1))
        rows.append(row)
    return {"frames": frames, "tokens": frames * TOKENS_A_FRAME, "steps": steps, "turns": len(seconds[0]),
            "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[128, 192], help="the first one is profiled")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3,
                        help=f"at least, for the first length; two for the others; more while a variant's disagree by "
                             f"over {AGREE * 100:.0f} percent, up to {MOST}")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu" / "end_to_end.json")
    args = parser.parse_args(arguments)
    chosen = [variant for variant in variants() if str(variant.dtype)[6:] in args.dtypes]
    record = {"kind": "end_to_end", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "machine": machine.describe(), "target": 2.0, "clips": []}
    for i, frames in enumerate(args.frames):
        record["clips"].append(measure(chosen, frames, args.steps, args.turns if i == 0 else min(2, args.turns),
                                       i == 0))
        for row in record["clips"][-1]["rows"]:
            quality = "" if row["psnr"] is None else f", {row['psnr']:.1f} dB against plain"
            print(f"{frames} frames, {row['dtype']}, {row['name']}: {row['seconds']:.2f} s, {row['ratio']:.2f}x"
                  f"{quality}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
