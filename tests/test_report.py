"""Metrics, plots and the page: what the demo leaves behind."""

import base64
import io
import re

import numpy as np
import pytest

from triskele import machine, metrics, report
from triskele.demo import plots


def test_psnr_by_hand():
    reference = np.zeros((2, 8, 8, 1))
    assert metrics.psnr(reference, reference) == float("inf")
    assert metrics.psnr(reference + 0.1, reference) == pytest.approx(20.0)
    half = reference.copy()
    half[0] += 0.1  # one of two pictures: half the mean squared error
    assert metrics.psnr(half, reference) == pytest.approx(20 + 10 * np.log10(2))


def test_ssim_of_equal_and_of_other_pictures():
    rng = np.random.default_rng(0)
    picture = rng.random((2, 3, 16, 16, 1))
    assert metrics.ssim(picture, picture) == pytest.approx(1.0)
    assert metrics.ssim(rng.random(picture.shape), picture) < 0.3


def test_metrics_refuse_other_shapes():
    with pytest.raises(ValueError, match="images: expected the shape of the reference"):
        metrics.psnr(np.zeros((1, 8, 8, 1)), np.zeros((1, 8, 8, 3)))


def decoded(uri: str):
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_sheet_holds_every_picture():
    pictures = np.stack([np.full((8, 8, 1), value) for value in (0.0, 0.5, 1.0)])
    sheet = decoded(plots.image_sheet(pictures, columns=3, side=16))
    assert sheet.size == (3 * 16 + 2 * 4, 16)
    assert [sheet.getpixel((20 * i + 8, 8))[0] for i in range(3)] == [0, 128, 255]


def test_animation_moves():
    videos = np.zeros((2, 5, 8, 8, 1))
    for t in range(5):
        videos[:, t, :, t] = 1
    image = decoded(plots.animation(videos, fps=10, side=16))
    assert image.n_frames == 5 and image.is_animated
    image.seek(0)
    first = np.asarray(image.convert("RGB"))
    image.seek(4)
    assert (first != np.asarray(image.convert("RGB"))).any()


def test_page_is_whole_and_asks_for_nothing():
    pictures = [report.Picture(plots.image_sheet(np.zeros((1, 8, 8, 1)), 1), "a <b>", "x & y", sharp=True)]
    table = (["a", "b"], [["1", report.ratio_cell(2.0)]])
    text = report.page("t", "lead <script>", [report.Section("s", "text", [table], pictures, [("log", "<raw>")])])
    assert "<script" not in text and "&lt;script&gt;" in text and "a &lt;b&gt;" in text and "&lt;raw&gt;" in text
    assert '<span class="faster">2.00×</span>' in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)


def test_ratio_colours():
    assert "slower" in report.ratio_cell(0.5) and "faster" in report.ratio_cell(1.5)
    assert 'class=""' in report.ratio_cell(1.0)
    assert report.decibel(float("inf")) == "identical"


def test_machine_names_the_hardware():
    record = machine.describe()
    assert record["cpu"] and record["cores"] >= 1 and record["torch"] and record["commit"]
