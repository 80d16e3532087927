"""Distil the video model's sparse attention from its dense teacher, by `triskele.finetune.distill_attention`.

    python examples/train_digits_sla.py                    # about ten minutes on 2 CPU cores

Measures, on the same seeds, how far the sparse model's videos are from the teacher's before (training-free), after the
projection alone, and after all weights. Writes a pipeline folder (default assets/digits-wan-sla) that
`load_video_pipeline(variant="sla")` loads, sparse as it was trained; the losses and figures go to --work.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import triskele as tk
from triskele import digits, machine
from triskele.digits.data import NATIVE_FRAMES, VideoSampler
from triskele.digits.prompts import NULL_CLASS, embed_labels
from triskele.finetune import Stage, distill_attention, teacher_of
from triskele.metrics import psnr

PROMPT_DROPOUT = 0.1
SHIFT = 3.0  # of the noise levels, as in the teacher's training


def batches(count: int, seed: int):
    """Endless (kwargs, target): noisy videos of every noise level, target the flow's velocity."""
    generator = torch.Generator().manual_seed(seed)
    sample = VideoSampler("train")
    while True:
        videos, labels = sample(count, NATIVE_FRAMES, generator)
        labels = torch.where(torch.rand(count, generator=generator) < PROMPT_DROPOUT, NULL_CLASS, labels)
        noise = torch.randn(videos.shape, generator=generator)
        uniform = torch.rand(count, generator=generator)
        sigmas = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        level = sigmas.view(-1, 1, 1, 1, 1)
        kwargs = dict(hidden_states=(1 - level) * videos + level * noise, timestep=1000 * sigmas,
                      encoder_hidden_states=embed_labels(labels), return_dict=False)
        yield kwargs, noise - videos


def generate(pipe, prompts, steps: int) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(list(prompts), num_inference_steps=steps, generator=torch.Generator().manual_seed(1234),
                           output_type="np").frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets/digits-wan-sla")
    parser.add_argument("--work", default="work/digits-wan-sla", help="folder for the loss plot and the log")
    parser.add_argument("--keep", type=float, default=0.15)
    parser.add_argument("--block-q", type=int, default=32)
    parser.add_argument("--block-k", type=int, default=32)
    parser.add_argument("--projection-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    pipe = digits.load_video_pipeline()
    teacher = teacher_of(pipe.transformer)
    prompts, steps = "0123456789"[::3], 12
    wanted = generate(pipe, prompts, steps)
    config = tk.SLA(keep=args.keep, block_q=args.block_q, block_k=args.block_k)
    handle = tk.patch(pipe, attention=config)
    print(handle.summary())
    quality = {"training-free": psnr(generate(pipe, prompts, steps), wanted)}
    print(quality, flush=True)

    source = batches(args.batch, args.seed)
    losses = []
    for name, stage in {
        "projection": Stage("projection", args.projection_steps, 2e-3),
        "all weights": Stage("all", args.steps, args.lr, teacher_weight=1.0, data_weight=0.25),
    }.items():
        result = distill_attention(pipe.transformer, teacher, source, (stage,), autocast=torch.bfloat16)
        losses += result.distillation
        quality[name] = psnr(generate(pipe, prompts, steps), wanted)
        print(quality, flush=True)

    pipe.save_pretrained(args.out)
    forget_paths(Path(args.out))
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    record = {"kind": "distill", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "machine": machine.describe(), "arguments": vars(args), "psnr": quality}
    (work / "distill.json").write_text(json.dumps(record, indent=1))
    plot(losses, args.projection_steps, work / "loss.png")
    print(f"wrote {args.out}")


def forget_paths(folder: Path) -> None:
    """diffusers notes where each part was loaded from; that is of no use to anyone else."""
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text())
        if values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def plot(losses, projection_steps: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=120)
    axes.semilogy(losses, linewidth=0.8)
    axes.axvline(projection_steps, linestyle=":", color="grey")
    axes.set_xlabel("step (dotted: from here on all weights)")
    axes.set_ylabel("mean squared difference to the teacher")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
