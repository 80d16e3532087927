"""What the demo generates: a scene is a pipeline, a way to call it and, where there is one, a judge of its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import triskele as tk
from triskele.checks import expected


@dataclass(frozen=True)
class Variant:
    """One row of the table: the arms to patch in. No arms: the plain pipeline that the others are compared with."""

    name: str
    arms: dict = field(default_factory=dict)
    load: str = ""  # which weights of the scene: "" or a fine-tuned variant of them
    note: str = ""


@dataclass(frozen=True)
class Scene:
    """load(variant.load) -> pipeline; call(pipeline, seed, steps) -> array [N, (T,) H, W, C] in [0, 1]."""

    key: str
    title: str
    load: Callable
    call: Callable
    steps: int
    variants: tuple[Variant, ...]
    captions: tuple[str, ...] = ()
    accuracy: Callable[[np.ndarray], float] | None = None
    frames_per_second: int = 12

    @property
    def plain(self) -> Variant:
        return self.variants[0]


def recognised(classifier, pictures: np.ndarray, labels) -> float:
    """Share of pictures [N, H, W, 1], or of single frames of videos [N, T, H, W, 1], that show their label."""
    tensor = torch.from_numpy(pictures[..., 0]).float().unsqueeze(1) * 2 - 1  # [N, 1, (T,) H, W] in [-1, 1]
    found = classifier.classify(tensor)
    wanted = torch.tensor(labels).view(-1, *[1] * (found.ndim - 1))
    return float((found == wanted).float().mean())


def fine_tuned_sla() -> tk.SLA:
    """The configuration that the shipped fine-tuned video model was distilled with, read from its config.json."""
    from triskele import digits

    config = json.loads((digits.asset_path("digits-wan-sla") / "transformer" / "config.json").read_text())
    return tk.SLA.from_dict(config["quantization_config"]["attention"])


IMAGE_LABELS = tuple(range(10)) * 2
VIDEO_PROMPTS = ("3", "7")


def image_scene() -> Scene:
    """The class-conditional digit DiT: DDIM with classifier-free guidance."""
    from triskele import digits

    classifier = digits.load_classifier()

    def call(pipe, seed, steps):
        generator = torch.Generator().manual_seed(seed)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(list(IMAGE_LABELS), guidance_scale=2.0, num_inference_steps=steps, generator=generator,
                      output_type="np").images
        return np.asarray(images)

    def accuracy(images):
        return recognised(classifier, images, IMAGE_LABELS)

    # Routing and rounding make the denoiser rough: below a few thousandths its rounds only follow that roughness.
    rough = tk.ParaTAA(window=None, tolerance=1e-2)
    small = dict(block_q=8, block_k=8, linear="none")  # 64 tokens: blocks of 8, so that there is something to choose
    variants = (
        Variant("plain"),
        Variant("attention: SLA, 50% sparse", dict(attention=tk.SLA(keep=0.5, **small)), note="training-free"),
        Variant("linear: SVDQuant W4A8, rank 16", dict(linear=tk.SVDQuant(rank=16))),
        Variant("sampler: ParaTAA, window of all steps", dict(sampler=tk.ParaTAA(window=None))),
        Variant("all arms", dict(attention=tk.SLA(keep=0.5, **small), linear=tk.SVDQuant(rank=16), sampler=rough),
                note="tolerance 1e-2"),
    )
    return Scene("image", "Handwritten digits: DiT, 50 DDIM steps", lambda _: digits.load_image_pipeline(), call, 50,
                 variants, tuple(str(label) for label in IMAGE_LABELS), accuracy)


def video_scene() -> Scene:
    """The bouncing-digit Wan transformer: flow matching, 1536 tokens a video, classifier-free guidance."""
    from triskele import digits

    classifier = digits.load_classifier()

    def call(pipe, seed, steps):
        generator = torch.Generator().manual_seed(seed)
        pipe.set_progress_bar_config(disable=True)
        frames = pipe(list(VIDEO_PROMPTS), num_inference_steps=steps, guidance_scale=3.0, generator=generator,
                      output_type="np").frames
        return np.asarray(frames)

    def accuracy(videos):
        return recognised(classifier, videos, [int(p) for p in VIDEO_PROMPTS])

    sla = fine_tuned_sla()
    variants = (
        Variant("plain"),
        Variant(f"attention: SLA, {1 - sla.keep:.0%} sparse", dict(attention=replace(sla, linear="none")),
                note="training-free"),
        Variant(f"attention: SLA, {1 - sla.keep:.0%} sparse, fine-tuned", {}, load="sla", note="distilled"),
        Variant("attention: VMoBA, top 2 of the chunks", dict(attention=tk.VMoBA(top_k=2)), note="training-free"),
        Variant("linear: SVDQuant W4A8, rank 16", dict(linear=tk.SVDQuant(rank=16))),
        Variant("sampler: ParaTAA, window 8", dict(sampler=tk.ParaTAA(window=8))),
        Variant("all arms, SLA fine-tuned", dict(linear=tk.SVDQuant(rank=16),
                                                 sampler=tk.ParaTAA(window=8, tolerance=1e-2)),
                load="sla", note="tolerance 1e-2"),
    )
    return Scene("video", "Bouncing digits: Wan, 24 frames, 1536 tokens, 20 flow-matching steps",
                 lambda variant: digits.load_video_pipeline(variant=variant or None), call, 20, variants,
                 tuple(f"“{p}”" for p in VIDEO_PROMPTS), accuracy)


def _class_numbers(prompt: str | None) -> list[int]:
    try:
        return [int(number) for number in (prompt or "").split(",")]
    except ValueError:
        raise expected("--prompt for a DiT", "class numbers, comma-separated", repr(prompt)) from None


def user_scene(folder: str, prompt: str | None, steps: int, device: str, call_kwargs: dict) -> Scene:
    """A user's own diffusers folder: each arm that its family supports, on one prompt."""
    import diffusers
    from diffusers import DiTPipeline

    from triskele.diffusers import supported_arms

    path = Path(folder)
    if not (path / "model_index.json").is_file():
        raise ValueError(f"--model: expected a diffusers folder with a model_index.json, got {folder!r}")
    if path.joinpath("model_index.json").stat().st_size > 1 << 20:
        raise ValueError(f"--model: {folder!r} has a model_index.json over 1 MiB")

    def load(_):
        return diffusers.DiffusionPipeline.from_pretrained(path, use_safetensors=True).to(device)

    def call(pipe, seed, steps):
        generator = torch.Generator().manual_seed(seed)
        pipe.set_progress_bar_config(disable=True)
        positional = [_class_numbers(prompt)] if isinstance(pipe, DiTPipeline) else []
        kwargs = dict(call_kwargs) if positional or prompt is None else {"prompt": prompt, **call_kwargs}
        out = pipe(*positional, num_inference_steps=steps, generator=generator, output_type="np", **kwargs)
        return np.asarray(out.frames if hasattr(out, "frames") else out.images)

    arms = supported_arms(load(""))
    variants = [Variant("plain")]
    offers = {"attention": ("attention: SLA, 80 % sparse", tk.SLA(keep=0.2, linear="none"), "training-free"),
              "linear": ("linear: SVDQuant W4A8", tk.SVDQuant(), ""),
              "sampler": ("sampler: ParaTAA, window 8", tk.ParaTAA(window=8), "")}
    for arm, (name, config, note) in offers.items():
        if arms.get(arm) is None:  # None: supported; otherwise the reason
            variants.append(Variant(name, {arm: config}, note=note))
    if len(variants) > 2:
        variants.append(Variant("all arms", {k: v for variant in variants for k, v in variant.arms.items()}))
    if len(variants) == 1:
        raise ValueError(f"--model: no arm supports this pipeline: {arms}")
    return Scene("model", f"{path.name}, {steps} steps", load, call, steps, tuple(variants))
