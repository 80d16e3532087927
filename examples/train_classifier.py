"""Train the digit classifier on real scans, as stills and as frames of rendered videos.

    python examples/train_classifier.py                    # about three minutes on 2 CPU cores

Writes assets/digits-classifier and prints the accuracy on the held-out scans, which no model here
has seen.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _training import Trainer, add_arguments, publish

from triskele.digits import load_classifier
from triskele.digits.classifier import DigitClassifier, centre_window
from triskele.digits.data import bounce, load_scans, render_images, render_videos


def distort(windows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turned by up to 0.2 rad, scaled by up to 12 %, moved by up to 1.5 pixels, grey levels bent, noisy."""
    count = len(windows)

    def spread(width: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * width

    angle, scale = spread(0.2), 1 + spread(0.12)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos() * scale
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin() * scale, angle.sin() * scale
    theta[:, 0, 2], theta[:, 1, 2] = spread(1.5 / 8), spread(1.5 / 8)
    grid = F.affine_grid(theta, list(windows.shape), align_corners=False)
    ink = F.grid_sample(windows + 1, grid, align_corners=False).clamp(0, 2) / 2
    ink = ink ** spread(0.5).exp().view(-1, 1, 1, 1)
    return ink * 2 - 1 + 0.08 * torch.randn(windows.shape, generator=generator)


def windows_of(scans: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the scans as the image model draws them, half as frames of the video model."""
    half = len(scans) // 2
    stills = centre_window(render_images(scans[:half]))
    corners = bounce(len(scans) - half, 1, generator)
    frames = centre_window(render_videos(scans[half:], corners)[:, :, 0])
    return torch.cat([stills, frames])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=2500, out="assets/digits-classifier")
    parser.set_defaults(lr=2e-3)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = DigitClassifier().to(args.device).train()
    scans, labels = load_scans("train")

    def loss(progress: float) -> torch.Tensor:
        pick = torch.randint(len(labels), (args.batch,), generator=generator)
        windows = distort(windows_of(scans[pick], generator), generator)
        logits = model(windows.to(args.device))
        return F.cross_entropy(logits, labels[pick].to(args.device), label_smoothing=0.05)

    def export(weights: dict[str, torch.Tensor]) -> None:
        averaged = DigitClassifier()
        averaged.load_state_dict(weights)
        publish(averaged.half(), args.out)
        averaged = load_classifier(args.out)
        test_scans, test_labels = load_scans("test")
        stills = averaged.classify(render_images(test_scans))
        videos = render_videos(test_scans, bounce(len(test_scans), 8, torch.Generator().manual_seed(1)))
        frames = averaged.classify(videos)
        print(f"held-out scans: stills {100 * (stills == test_labels).float().mean():.2f} %,", end=" ")
        print(f"video frames {100 * (frames == test_labels[:, None]).float().mean():.2f} %")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.02)
    Trainer(model, [optimizer], loss, generator, args, export, ema_decay=0.99).run()


if __name__ == "__main__":
    main()
