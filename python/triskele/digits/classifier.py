"""A small network that reads digits: the yardstick for what the generative models draw.

It sees every picture the same way, whether a still of 16x16 or a frame of 32x32: the ink's centre
of mass is moved to the middle of a 16x16 window first. So one network judges both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from .data import NUM_CLASSES

WINDOW = 16
_INK_FLOOR = 0.25  # fainter pixels are left out of the centre of mass: sampling noise, not ink


def centroids(pictures: torch.Tensor) -> torch.Tensor:
    """Centres of mass of the ink (x, y), in pixels from the top-left corner: [..., H, W] -> [..., 2].

    Pictures are in [-1, 1]. Without any ink the centre is the middle of the picture.
    """
    height, width = pictures.shape[-2:]
    ink = (pictures.float() + 1) / 2
    ink = torch.where(ink > _INK_FLOOR, ink, 0.0)
    mass = ink.sum((-2, -1))
    x = torch.arange(width, dtype=torch.float32, device=ink.device) + 0.5
    y = torch.arange(height, dtype=torch.float32, device=ink.device) + 0.5
    safe = mass.clamp(min=1e-6)
    centre = torch.stack([(ink.sum(-2) * x).sum(-1) / safe, (ink.sum(-1) * y).sum(-1) / safe], dim=-1)
    middle = torch.tensor([width / 2, height / 2], device=ink.device)
    return torch.where((mass > 0).unsqueeze(-1), centre, middle)


def centre_window(pictures: torch.Tensor) -> torch.Tensor:
    """[N, 1, H, W] in [-1, 1] -> [N, 1, 16, 16], the window around each picture's centre of ink."""
    count, _, height, width = pictures.shape
    centre = centroids(pictures[:, 0])
    size = torch.tensor([width, height], dtype=torch.float32, device=pictures.device)
    theta = torch.zeros(count, 2, 3, device=pictures.device)
    theta[:, 0, 0], theta[:, 1, 1] = WINDOW / width, WINDOW / height
    theta[:, :, 2] = 2 * centre / size - 1
    grid = F.affine_grid(theta, [count, 1, WINDOW, WINDOW], align_corners=False)
    # Outside lies paper, which is 0 after this shift.
    return F.grid_sample(pictures.float() + 1, grid, mode="bilinear", align_corners=False).clamp(0, 2) - 1


class DigitClassifier(ModelMixin, ConfigMixin):
    """Three convolutions and two linear layers over a centred 16x16 window."""

    @register_to_config
    def __init__(self, channels: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.linear1 = nn.Linear(2 * channels * (WINDOW // 4) ** 2, hidden)
        self.linear2 = nn.Linear(hidden, NUM_CLASSES)
        self.dropout = nn.Dropout(0.3)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows [N, 1, 16, 16] in [-1, 1] -> logits [N, 10]."""
        hidden = F.max_pool2d(F.gelu(self.conv1(windows)), 2)  # [N, C, 8, 8]
        hidden = F.max_pool2d(F.gelu(self.conv2(hidden)), 2)  # [N, 2C, 4, 4]
        hidden = F.gelu(self.conv3(hidden)).flatten(1)  # [N, 2C * 16]
        return self.linear2(self.dropout(F.gelu(self.linear1(self.dropout(hidden)))))

    @torch.no_grad()
    def classify(self, pictures: torch.Tensor) -> torch.Tensor:
        """The digit in each picture: [N, 1, H, W], or videos [N, 1, T, H, W], in [-1, 1] -> [N] or [N, T].

        A video is read frame by frame; no frame knows of its neighbours. Raises ValueError for
        another number of dimensions or of channels.
        """
        if pictures.ndim not in (4, 5) or pictures.shape[1] != 1:
            raise ValueError(
                f"expected pictures [N, 1, H, W] or videos [N, 1, T, H, W], got shape {list(pictures.shape)}"
            )
        frames = pictures if pictures.ndim == 4 else pictures.transpose(1, 2).flatten(0, 1)
        if len(frames) == 0:
            return torch.zeros(pictures.shape[:1] + pictures.shape[2:-2], dtype=torch.int64)
        was_training = self.training
        self.eval()
        found = self(centre_window(frames.to(self.device)).to(self.dtype)).argmax(1)
        self.train(was_training)
        return found if pictures.ndim == 4 else found.view(pictures.shape[0], pictures.shape[2])
