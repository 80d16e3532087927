"""Measures the shipped digit models and leaves a record: how many samples are recognised, how smoothly digits move.

    python bench/digits_quality.py          # bench/results/cpu/digits.json, a few minutes on two cores

Motion is read from the path of the ink's centre of mass: a step is its way from one frame to the next, a bend the
change of a step (walls included).
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from triskele import digits, machine
from triskele.digits.classifier import centroids
from triskele.digits.data import NATIVE_FRAMES, bounce, load_scans, render_images, render_videos

JUMP = 3.0  # pixels; the data's fastest digit moves 2 a frame, and its ink a little more where it shrinks at a wall


def motion(clips: torch.Tensor) -> dict:
    """Of clips [N, 1, T, 32, 32] in [-1, 1]."""
    step = centroids(clips[:, 0]).diff(dim=1)
    length, bend = step.norm(dim=-1), step.diff(dim=1).norm(dim=-1)
    return {"mean_step": float(length.mean()), "median_bend": float(bend.median()),
            "largest_step": float(length.max()), "jumps": float((length > JUMP).float().mean()),
            "clips_with_jumps": float((length > JUMP).any(1).float().mean())}


def recognised(classifier, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    found = classifier.classify(pictures)
    return float((found == labels.view(-1, *[1] * (found.ndim - 1))).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "digits.json")
    args = parser.parse_args()
    classifier = digits.load_classifier()
    generator = torch.Generator().manual_seed(7)
    scans, labels = load_scans("test")
    real = render_videos(scans, bounce(len(scans), NATIVE_FRAMES, generator))
    found = {
        "held_out_scans": len(scans),
        "classifier_stills": recognised(classifier, render_images(scans), labels),
        "classifier_frames": recognised(classifier, real, labels),
        "real": motion(real),
        "shuffled": motion(real[:, :, torch.randperm(NATIVE_FRAMES, generator=generator)]),
    }

    pipe = digits.load_image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    wanted = torch.arange(args.images) % 10
    images = pipe(wanted.tolist(), guidance_scale=2.0, num_inference_steps=args.steps, generator=generator,
                  output_type="np").images
    found["images"] = recognised(classifier, torch.from_numpy(images[..., 0])[:, None].float() * 2 - 1, wanted)

    for name, variant in (("video", None), ("sparse", "sla")):
        pipe = digits.load_video_pipeline(variant=variant)
        pipe.set_progress_bar_config(disable=True)
        clips, wanted = [], torch.arange(args.clips) % 10
        for label in tqdm(wanted.tolist(), desc=name):
            clips.append(pipe(f"a moving {label}", num_inference_steps=args.steps, output_type="pt",
                              generator=torch.Generator().manual_seed(len(clips))).frames.transpose(1, 2) * 2 - 1)
        clips = torch.cat(clips)
        found[name] = {"recognised": recognised(classifier, clips, wanted), **motion(clips)}

    record = {"kind": "digits", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "machine": machine.describe(), "images": args.images, "clips": args.clips, "steps": args.steps,
              "found": found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
