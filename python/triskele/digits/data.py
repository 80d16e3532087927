"""The data that the small models learn: scikit-learn's handwritten digits, still and bouncing.

A still picture is the 8x8 scan enlarged to 16x16. A video is one digit that moves at a constant
velocity in a 32x32 frame and is reflected by its walls. Everything is drawn from a
`torch.Generator`, so a seed fixes a data set, and no file is downloaded: the scans are part of
scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

IMAGE_SIZE = 16  # side of a still picture, pixels
FRAME_SIZE = 32  # side of a video frame, pixels
DIGIT_SIZE = 16  # side of a digit inside a frame, pixels
NATIVE_FRAMES = 24  # frames of a video at the size the model is trained for
NUM_CLASSES = 10

_HELD_OUT_EVERY = 5  # one scan in five of every class is never trained on


def load_scans(split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """The scans of one split: images [N, 1, 8, 8] in [0, 1] and labels [N] (int64).

    The split takes every fifth scan of each class, in file order, as the held-out part. The file is
    ordered by writer, so this is a test of new pictures, not of new writers.

    Raises ValueError for a split other than "train", "test", "all"; ImportError without scikit-learn.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digit scans come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    if split == "all":
        return images, labels
    rank = torch.zeros_like(labels)  # the how-many-eth of its class a scan is
    for digit in range(NUM_CLASSES):
        of_class = (labels == digit).nonzero().squeeze(1)
        rank[of_class] = torch.arange(len(of_class))
    held_out = rank % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    keep = held_out if split == "test" else ~held_out
    return images[keep], labels[keep]


def render_images(scans: torch.Tensor) -> torch.Tensor:
    """Scans [N, 1, 8, 8] in [0, 1] -> pictures [N, 1, 16, 16] in [-1, 1]."""
    large = F.interpolate(scans, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return large.clamp(0, 1) * 2 - 1


@dataclass(frozen=True)
class Motion:
    """How digits move: speeds in pixels a frame, and the room that their top-left corner has."""

    min_speed: float = 0.5
    max_speed: float = 2.0
    room: float = float(FRAME_SIZE - DIGIT_SIZE)


def bounce(
    count: int, frames: int, generator: torch.Generator | None = None, motion: Motion = Motion()
) -> torch.Tensor:
    """Top-left corners [count, frames, 2] (x, y) of boxes that move straight and bounce off the walls.

    Reflection at both walls is a triangle wave of the straight path, so a position depends on its
    frame number alone and a longer clip continues a shorter one.
    """

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    start = uniform(count, 1, 2) * motion.room
    speed = motion.min_speed + uniform(count, 1) * (motion.max_speed - motion.min_speed)
    angle = uniform(count, 1) * (2 * torch.pi)
    velocity = torch.stack([speed * angle.cos(), speed * angle.sin()], dim=-1)  # [count, 1, 2]
    time = torch.arange(frames, dtype=torch.float32).view(1, frames, 1)
    straight = (start + velocity * time) % (2 * motion.room)
    return motion.room - (straight - motion.room).abs()


def render_videos(scans: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Scans [N, 1, 8, 8] in [0, 1] at corners [N, T, 2] -> videos [N, 1, T, 32, 32] in [-1, 1].

    The scan is enlarged and moved by one bicubic resampling, so that a motion of a fraction of a
    pixel is visible as such.
    """
    count, frames, _ = corners.shape
    # Normalised sampling: output pixel o lies at (o - corner) inside the digit's box.
    scale = FRAME_SIZE / DIGIT_SIZE
    shift = scale - 1 - 2 * corners.reshape(-1, 2) / DIGIT_SIZE  # [N*T, 2]
    theta = torch.zeros(count * frames, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [count * frames, 1, FRAME_SIZE, FRAME_SIZE], align_corners=False)
    repeated = scans.repeat_interleave(frames, dim=0)
    drawn = F.grid_sample(repeated, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (drawn.clamp(0, 1) * 2 - 1).view(count, frames, 1, FRAME_SIZE, FRAME_SIZE).transpose(1, 2)


class ImageSampler:
    """An endless supply of (pictures [N, 1, 16, 16], labels [N]) drawn with replacement."""

    def __init__(self, split: str = "train"):
        scans, self.labels = load_scans(split)
        self.images = render_images(scans)

    def __call__(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        pick = torch.randint(len(self.labels), (count,), generator=generator)
        return self.images[pick], self.labels[pick]


class VideoSampler:
    """An endless supply of (videos [N, 1, T, 32, 32], labels [N]); every draw has new paths."""

    def __init__(self, split: str = "train", motion: Motion = Motion()):
        self.scans, self.labels = load_scans(split)
        self.motion = motion

    def __call__(self, count: int, frames: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        pick = torch.randint(len(self.labels), (count,), generator=generator)
        corners = bounce(count, frames, generator, self.motion)
        return render_videos(self.scans[pick], corners), self.labels[pick]
