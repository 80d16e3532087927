"""Fidelity of pictures against the plain pipeline's: PSNR and SSIM (scikit-image), averaged over pictures."""

from __future__ import annotations

import numpy as np

from triskele.checks import expected


def _pairs(images, reference):
    images, reference = np.asarray(images, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if images.shape != reference.shape or images.ndim < 3:
        raise expected("images", f"the shape of the reference {reference.shape}, [..., H, W, C]", images.shape)
    flat = (-1, *images.shape[-3:])
    return images.reshape(flat), reference.reshape(flat)


def psnr(images, reference) -> float:
    """10 log10(1 / mean (x - y)^2) in dB over all pictures together; inf where they are equal.

    images, reference  arrays [..., H, W, C] with values in [0, 1].
    One mean over everything: a mean of logarithms would let a single equal picture make the figure infinite.
    """
    a, b = _pairs(images, reference)
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(images, reference) -> float:
    """Mean structural similarity (Wang et al. 2004, window 7) of pictures [..., H, W, C] in [0, 1]; 1 where equal."""
    from skimage.metrics import structural_similarity

    a, b = _pairs(images, reference)
    return float(np.mean([structural_similarity(x, y, data_range=1.0, channel_axis=-1) for x, y in zip(a, b)]))
