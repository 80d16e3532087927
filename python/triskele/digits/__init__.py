"""Small trained models of handwritten digits: a picture DiT, a video DiT, and a classifier to judge them.

    pipe = triskele.digits.load_image_pipeline()
    pictures = pipe([3, 1, 4], generator=torch.manual_seed(0)).images

They are the fixtures on which this project measures fidelity: real, trained, and small enough to be
part of the package. Training: `examples/train_digits_image.py`, `train_digits_video.py`,
`train_classifier.py`. Loading needs diffusers; importing this module does not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .classifier import DigitClassifier
    from .pipelines import DigitsDiTPipeline, DigitsVideoPipeline

__all__ = ["AssetError", "asset_path", "load_classifier", "load_image_pipeline", "load_video_pipeline"]

IMAGE_ASSET = "digits-dit"
VIDEO_ASSET = "digits-wan"
CLASSIFIER_ASSET = "digits-classifier"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class AssetError(RuntimeError):
    """A model folder is missing, incomplete, or does not hold what its configuration says."""


def asset_path(name: str) -> Path:
    """The folder of a shipped model, in the installed package or in the source tree.

    Raises AssetError, with the places searched, when it is in neither; ValueError for a name that is
    no plain folder name.
    """
    if not name or name != os.path.basename(name) or name in (".", ".."):
        raise ValueError(f"an asset is named by one folder name, got {name!r}")
    package = Path(__file__).resolve().parent.parent
    # An installed package has its assets inside; an editable one beside its sources.
    places = [package / "assets" / name, package.parent.parent / "assets" / name]
    for place in places:
        if place.is_dir():
            return place
    searched = ", ".join(str(place) for place in places)
    raise AssetError(f"the model {name!r} was not found; searched {searched}. examples/train_*.py makes it anew")


def load_image_pipeline(
    path: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> DigitsDiTPipeline:
    """The class-conditional digit pipeline (DiTTransformer2DModel, 1 x 16 x 16 pixels, 64 tokens).

    path     a folder of its own instead of the shipped one
    dtype    of the weights in memory; on disk they are float16
    variant  "x" for the shipped folder digits-dit-x
    Raises AssetError for a folder that is missing, incomplete or inconsistent.
    """
    from .pipelines import DigitsDiTPipeline

    return _load_pipeline(DigitsDiTPipeline, _folder(IMAGE_ASSET, path, variant), dtype)


def load_video_pipeline(
    path: str | os.PathLike | None = None, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> DigitsVideoPipeline:
    """The bouncing-digit pipeline (WanTransformer3DModel, 24 frames of 32 x 32, 1,536 tokens).

    path     a folder of its own instead of the shipped one
    variant  "x" for the shipped folder digits-wan-x, a fine-tuned relative of digits-wan
    dtype    of the weights in memory
    Raises AssetError for a folder that is missing, incomplete or inconsistent.
    """
    from .pipelines import DigitsVideoPipeline

    return _load_pipeline(DigitsVideoPipeline, _folder(VIDEO_ASSET, path, variant), dtype)


def load_classifier(path: str | os.PathLike | None = None) -> DigitClassifier:
    """The classifier that judges samples; see `DigitClassifier.classify`. Raises AssetError as above."""
    from .classifier import DigitClassifier

    folder = _folder(CLASSIFIER_ASSET, path, None)
    model = _checked(folder, lambda: DigitClassifier.from_pretrained(folder, **_offline(torch.float32)))
    _check_weights(folder, model)
    return model.eval()


def _folder(asset: str, path: str | os.PathLike | None, variant: str | None) -> Path:
    if path is not None and variant is not None:
        raise ValueError("give a path or a variant of the shipped model, not both")
    folder = Path(path) if path is not None else asset_path(f"{asset}-{variant}" if variant else asset)
    if not folder.is_dir():
        raise AssetError(f"{folder} is not a folder; expected one that save_pretrained wrote")
    return folder


def _offline(dtype: torch.dtype) -> dict:
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    dtype_name = "dtype" if version >= (0, 42) else "torch_dtype"  # the old name warns in the new version
    # use_safetensors: a pickle in a folder from elsewhere could run code, and ours never holds one.
    return {dtype_name: dtype, "local_files_only": True, "use_safetensors": True}


def _load_pipeline(pipeline_class: type, folder: Path, dtype: torch.dtype):
    index = folder / "model_index.json"
    if not index.is_file():
        raise AssetError(f"{folder} holds no model_index.json, so it is no saved pipeline")
    pipe = _checked(folder, lambda: pipeline_class.from_pretrained(folder, **_offline(dtype)))
    _check_weights(folder / "transformer", pipe.transformer)
    pipe.transformer.eval()
    return pipe


def _checked(folder: Path, load):
    # safetensors raises an exception of its own, derived from Exception alone.
    from safetensors import SafetensorError

    failures = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)
    try:
        return load()
    except (*failures, json.JSONDecodeError) as error:
        raise AssetError(f"{folder} could not be loaded: {type(error).__name__}: {error}") from error


def _check_weights(folder: Path, model: torch.nn.Module) -> None:
    """Every weight of the model is in its file, in its shape, and finite.

    diffusers leaves a weight that the file lacks at its random start and only logs it, which would
    show up much later as a bad picture.
    """
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if stored != expected:
        missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        both = [key for key in expected if key in stored and stored[key] != expected[key]]
        shapes = [f"{key}: {stored[key]} instead of {expected[key]}" for key in both]
        raise AssetError(
            f"{folder / WEIGHTS_FILE} does not fit its configuration: missing {missing[:5]}, unexpected {extra[:5]},"
            f" wrong shapes {shapes[:5]}"
        )
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AssetError(f"{folder / WEIGHTS_FILE}: {key} holds values that are not finite")
