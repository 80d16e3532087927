"""The shipped digit models: they load, draw what they are asked for, and refuse what is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from triskele import digits
from triskele.digits import AssetError, asset_path, load_classifier, load_image_pipeline, load_video_pipeline
from triskele.digits.classifier import centre_window, centroids
from triskele.digits.data import FRAME_SIZE, Motion, bounce, load_scans, render_images, render_videos
from triskele.digits.prompts import NULL_CLASS, TEXT_DIM, embed_labels, parse_digit

MAX_BYTES = 12 * 1000 * 1000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def image_pipe():
    pipe = load_image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def video_pipe():
    pipe = load_video_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def videos(video_pipe):
    """Four native clips, [4, 1, 24, 32, 32] in [-1, 1], and what they were asked to show."""
    labels = [0, 3, 5, 7]
    prompts = [f"a moving {digit}" for digit in labels]
    frames = video_pipe(prompts, num_inference_steps=16, generator=seeded(), output_type="pt").frames
    assert frames.shape == (4, 24, 1, FRAME_SIZE, FRAME_SIZE)
    return frames.transpose(1, 2) * 2 - 1, torch.tensor(labels)


# --- data ------------------------------------------------------------------------------------


def test_splits_share_no_scan_and_hold_every_digit():
    (train, train_labels), (test, test_labels) = load_scans("train"), load_scans("test")
    assert len(train) + len(test) == len(load_scans("all")[0]) == 1797
    assert train_labels.bincount(minlength=10).min() > 130 and test_labels.bincount(minlength=10).min() > 30
    seen = {scan.numpy().tobytes() for scan in train}
    assert not any(scan.numpy().tobytes() in seen for scan in test)
    with pytest.raises(ValueError, match="validation"):
        load_scans("validation")


def test_bouncing_is_straight_between_walls_and_continues():
    corners = bounce(50, 48, seeded())
    assert corners.min() >= 0 and corners.max() <= Motion().room
    step = corners[:, 1:] - corners[:, :-1]
    bend = (step[:, 1:] - step[:, :-1]).abs()
    speed = step.abs()
    near_wall = (corners[:, 1:-1] < speed[:, 1:]) | (corners[:, 1:-1] > Motion().room - speed[:, 1:])
    near_wall |= (corners[:, 1:-1] < 2) | (corners[:, 1:-1] > Motion().room - 2)
    assert bend[~near_wall].max() < 1e-4
    assert torch.equal(bounce(50, 24, seeded()), corners[:, :24])


def test_a_rendered_digit_is_where_its_corner_says():
    scan = torch.zeros(1, 1, 8, 8)
    scan[..., 2:6, 2:6] = 1.0  # its centre of mass is the middle of the box, 8 pixels from the corner
    corners = torch.tensor([[[0.0, 0.0], [3.25, 7.5], [16.0, 16.0]]])
    found = centroids(render_videos(scan, corners)[0, 0])
    assert torch.allclose(found, corners[0] + 8, atol=0.05)


@pytest.mark.parametrize("prompt", ["3", "a moving 3", "Three", "the digit three, moving", "digit:3."])
def test_a_prompt_names_its_digit(prompt):
    assert parse_digit(prompt) == 3


@pytest.mark.parametrize("prompt", ["", "a cat", "33", "3 and 4", "someone"])
def test_a_prompt_without_one_digit_is_refused(prompt):
    with pytest.raises(ValueError, match="digit"):
        parse_digit(prompt)


def test_prompt_embeddings_are_one_hot():
    embeds = embed_labels(torch.tensor([0, 9, NULL_CLASS]))
    assert embeds.shape == (3, 1, TEXT_DIM) and torch.equal(embeds.sum(-1), torch.ones(3, 1))
    assert embeds[:, 0].argmax(-1).tolist() == [0, 9, NULL_CLASS]


# --- classifier ------------------------------------------------------------------------------


def test_classifier_reads_held_out_scans(classifier):
    scans, labels = load_scans("test")
    stills = classifier.classify(render_images(scans)) == labels
    frames = classifier.classify(render_videos(scans, bounce(len(scans), 3, seeded()))) == labels[:, None]
    assert stills.float().mean() >= 0.98 and frames.float().mean() >= 0.98


def test_classifier_does_not_see_where_a_digit_is(classifier):
    scans, _ = load_scans("test")
    corners = torch.tensor([[0.0, 0.0], [16.0, 16.0], [5.5, 9.25]]).expand(20, 3, 2)
    windows = centre_window(render_videos(scans[:20], corners).transpose(1, 2).flatten(0, 1)).view(20, 3, 16, 16)
    assert (windows - windows[:, :1]).abs().mean() < 0.05


def test_classifier_takes_an_empty_batch_and_refuses_colour(classifier):
    assert classifier.classify(torch.zeros(0, 1, 16, 16)).shape == (0,)
    assert classifier.classify(torch.zeros(0, 1, 5, 32, 32)).shape == (0, 5)
    assert classifier.classify(torch.full((2, 1, 16, 16), -1.0)).shape == (2,)  # no ink at all
    with pytest.raises(ValueError, match="shape"):
        classifier.classify(torch.zeros(2, 3, 16, 16))


# --- image model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-dit", "digits-wan", "digits-classifier"])
def test_assets_are_small_and_safetensors(name):
    files = [path for path in asset_path(name).rglob("*") if path.is_file()]
    assert files and all(path.suffix in (".json", ".safetensors") for path in files)
    assert max(path.stat().st_size for path in files) <= MAX_BYTES


def test_images_are_what_was_asked_for(image_pipe, classifier):
    from triskele.digits.pipelines import all_labels

    labels = all_labels(50)
    images = image_pipe(labels, guidance_scale=2.0, num_inference_steps=25, generator=seeded(), output_type="pt").images
    assert images.shape == (50, 1, 16, 16)
    accuracy = (classifier.classify(images * 2 - 1) == torch.tensor(labels)).float().mean()
    assert accuracy >= 0.95, f"the classifier recognised {accuracy:.1%} of the image model's samples"


def test_images_of_one_digit_differ(image_pipe):
    settings = {"guidance_scale": 2.0, "num_inference_steps": 15, "output_type": "pt"}
    images = image_pipe([4] * 6, generator=seeded(), **settings).images
    gaps = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(6)
    assert gaps.min() > 1.0


def test_images_are_deterministic(image_pipe):
    def draw(seed):
        return image_pipe([1, 2], num_inference_steps=4, generator=seeded(seed), output_type="np").images

    assert np.array_equal(draw(5), draw(5)) and not np.array_equal(draw(5), draw(6))


def test_the_parts_work_in_diffusers_own_dit_pipeline(image_pipe):
    from diffusers import DiTPipeline

    plain = DiTPipeline(image_pipe.transformer, image_pipe.vae, image_pipe.scheduler)
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "np"}
    expected = image_pipe([7], generator=seeded(), **settings).images
    assert np.array_equal(plain([7], generator=seeded(), **settings).images, expected)


def test_image_pipeline_survives_save_and_load(image_pipe, tmp_path):
    image_pipe.save_pretrained(tmp_path / "copy")
    copy = load_image_pipeline(tmp_path / "copy")
    copy.set_progress_bar_config(disable=True)
    assert copy.get_label_ids(["three"]) == [3] == copy.get_label_ids(["3"])
    settings = {"num_inference_steps": 3, "output_type": "np"}
    assert np.array_equal(
        copy([7], generator=seeded(), **settings).images, image_pipe([7], generator=seeded(), **settings).images
    )


# --- video model -----------------------------------------------------------------------------


def test_video_model_has_its_tokens(video_pipe):
    config = video_pipe.transformer.config
    _, height, width = config.patch_size
    assert 24 * (FRAME_SIZE // height) * (FRAME_SIZE // width) == 1536


def test_single_frames_are_what_was_asked_for(videos, classifier):
    clips, labels = videos
    accuracy = (classifier.classify(clips) == labels[:, None]).float().mean()
    assert accuracy >= 0.85, f"the classifier recognised {accuracy:.1%} of the video model's frames"


def test_digits_move_smoothly(videos):
    """Paths are close to straight from frame to frame; see docs/models.md for how close.

    By the same measure, real clips bend by 0.10 pixels in the median frame, and the frames of a clip in
    random order by 9.9. These bounds guard what the shipped weights reach, which is short of real: a digit
    trembles by a fraction of a pixel, and now and then a stroke is lost for a frame, which moves its
    centre of mass.
    """
    clips, _ = videos
    path = centroids(clips[:, 0])  # [N, T, 2]
    step = path[:, 1:] - path[:, :-1]
    length = step.norm(dim=-1)
    bend = (step[:, 1:] - step[:, :-1]).norm(dim=-1)
    assert length.mean() > 0.3, "the digits stand still"
    assert bend.median() < 0.6, f"the median frame bends its path by {bend.median():.2f} pixels"
    jumps = (length > 3.0).float().mean()  # the fastest digit of the data moves by 2 pixels
    assert jumps <= 0.03, f"{jumps:.1%} of all steps are jumps"


def test_videos_are_deterministic_and_sized_as_asked(video_pipe):
    def draw(seed, frames):
        result = video_pipe("7", num_frames=frames, num_inference_steps=2, generator=seeded(seed), output_type="np")
        return result.frames

    first = draw(5, 6)
    assert first.shape == (1, 6, FRAME_SIZE, FRAME_SIZE, 1)
    assert np.array_equal(first, draw(5, 6)) and not np.array_equal(first, draw(6, 6))
    assert draw(5, 48).shape[1] == 48


def test_video_prompts(video_pipe):
    with pytest.raises(ValueError, match="names no digit"):
        video_pipe("a cat", num_frames=2, num_inference_steps=1)
    with pytest.raises(ValueError, match="several digits"):
        video_pipe(["1", "2 or 3"], num_frames=2, num_inference_steps=1)
    with pytest.raises(ValueError, match="2 negative prompts"):
        video_pipe(["1", "2"], negative_prompt=["3"], num_frames=2, num_inference_steps=1)
    embeds, negatives = video_pipe.encode_prompt(["1", "2"], num_videos_per_prompt=2)
    assert embeds[:, 0].argmax(-1).tolist() == [1, 1, 2, 2]
    assert negatives[:, 0].argmax(-1).tolist() == [NULL_CLASS] * 4
    assert video_pipe.encode_prompt("1", do_classifier_free_guidance=False)[1] is None


def test_video_parts_work_in_diffusers_own_wan_pipeline(video_pipe):
    from diffusers import WanPipeline

    plain = WanPipeline(None, None, video_pipe.vae, video_pipe.scheduler, video_pipe.transformer)
    plain.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 1, 4, FRAME_SIZE, FRAME_SIZE, generator=seeded())
    embeds = {
        "prompt_embeds": embed_labels(torch.tensor([3])),
        "negative_prompt_embeds": embed_labels(torch.tensor([NULL_CLASS])),
    }
    settings = {"latents": latents, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    expected = video_pipe("3", num_frames=4, **settings).frames
    found = plain(height=FRAME_SIZE, width=FRAME_SIZE, num_frames=4, **embeds, **settings).frames
    assert np.array_equal(found, expected)


def test_video_pipeline_survives_save_and_load(video_pipe, tmp_path):
    video_pipe.save_pretrained(tmp_path / "copy")
    copy = load_video_pipeline(tmp_path / "copy")
    copy.set_progress_bar_config(disable=True)
    settings = {"num_frames": 3, "num_inference_steps": 2, "output_type": "np"}
    assert np.array_equal(
        copy("7", generator=seeded(), **settings).frames, video_pipe("7", generator=seeded(), **settings).frames
    )


# --- broken folders --------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of the image model, to be broken."""
    shutil.copytree(asset_path("digits-dit"), tmp_path / "broken")
    return tmp_path / "broken"


def weights_of(folder: Path) -> Path:
    return folder / "transformer" / digits.WEIGHTS_FILE


def refused(folder: Path) -> str:
    with pytest.raises(AssetError) as caught:
        load_image_pipeline(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    assert "not a folder" in refused(tmp_path / "nowhere")
    assert "model_index.json" in refused(tmp_path)


def test_a_truncated_file_is_refused(broken):
    data = weights_of(broken).read_bytes()
    weights_of(broken).write_bytes(data[: len(data) // 2])
    refused(broken)


def test_a_hostile_header_is_refused(broken):
    # The first eight bytes say how long the header is: here, longer than any memory.
    weights_of(broken).write_bytes(b"\xff" * 8 + b"{}")
    refused(broken)


def test_a_missing_weight_is_named(broken):
    weights = load_file(weights_of(broken))
    del weights["proj_out_2.weight"]
    save_file(weights, weights_of(broken), metadata={"format": "pt"})
    assert "proj_out_2.weight" in refused(broken)


def test_a_wrong_shape_is_named(broken):
    weights = load_file(weights_of(broken))
    weights["proj_out_2.weight"] = torch.zeros(3, 3)
    save_file(weights, weights_of(broken), metadata={"format": "pt"})
    assert "proj_out_2.weight" in refused(broken)


def test_nan_weights_are_named(broken):
    weights = load_file(weights_of(broken))
    weights["proj_out_2.bias"][0] = float("nan")
    save_file(weights, weights_of(broken), metadata={"format": "pt"})
    assert "proj_out_2.bias" in refused(broken)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"_class_name": "DigitsDiTPipeline"}'])
def test_a_broken_index_is_refused(broken, text):
    (broken / "model_index.json").write_text(text)
    refused(broken)


def test_a_component_of_another_module_is_not_imported(broken):
    index = json.loads((broken / "model_index.json").read_text())
    index["vae"] = ["antigravity", "anything"]
    (broken / "model_index.json").write_text(json.dumps(index))
    refused(broken)


def test_names_and_arguments_that_make_no_sense():
    with pytest.raises(AssetError, match="train_"):
        asset_path("digits-none")
    for name in ("", "..", "../digits-dit", "/etc"):
        with pytest.raises(ValueError, match="folder name"):
            asset_path(name)
    with pytest.raises(ValueError, match="not both"):
        load_video_pipeline(path=".", variant="sla")
