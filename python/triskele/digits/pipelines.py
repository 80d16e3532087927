"""Pipelines around the digit models: diffusers' own, with the little that digits need added.

The transformers are diffusers classes, unchanged, and so is every denoising loop. What is added: a
VAE's stand-in for models that work on pixels, prompts that name a digit, and defaults that fit.
Importing this module is what lets `from_pretrained` of diffusers find `PixelAutoencoder`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import DiTPipeline, ModelMixin, WanPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput

from .data import FRAME_SIZE, NATIVE_FRAMES, NUM_CLASSES
from .prompts import NULL_CLASS, embed_labels, parse_digit

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_NAMES = {digit: f"{digit}, {word}" for digit, word in enumerate(_WORDS)}


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """The identity, with the configuration that DiTPipeline and WanPipeline read of a VAE.

    Latents are pixels: one channel, no compression in space or time, mean 0, deviation 1.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 1,
        scaling_factor: float = 1.0,
        scale_factor_temporal: int = 1,
        scale_factor_spatial: int = 1,
        latents_mean: tuple[float, ...] = (0.0,),
        latents_std: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__()
        # Pipelines ask a VAE for its dtype and device, which a module without a tensor can't answer.
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents as they are, [N, 1, H, W] or [N, 1, T, H, W]."""
        return DecoderOutput(sample=latents) if return_dict else (latents,)


class DigitsDiTPipeline(DiTPipeline):
    """diffusers' DiTPipeline whose labels ("3" or "three") survive save_pretrained."""

    # id2label: {3: "3, three"}. No annotation: diffusers compares it with what JSON gives back and
    # warns that "3" is no int; the parent converts the keys.
    def __init__(self, transformer, vae, scheduler, id2label=None):
        super().__init__(transformer, vae, scheduler, id2label=id2label)
        # The parent keeps the labels to itself, and a saved pipeline forgets them.
        self.register_to_config(id2label=id2label)


class _EveryFrameCount(int):
    """1, of which every number is a multiple plus one.

    WanPipeline asks that `num_frames % factor == 1`, which holds for no number when a VAE leaves
    time alone (factor 1); it would then warn and draw one frame more than asked for.
    """

    def __rmod__(self, number: int) -> int:
        return 1


class DigitsVideoPipeline(WanPipeline):
    """diffusers' WanPipeline for prompts such as "3" or "a moving 3".

    There is no text encoder: a prompt becomes one one-hot token (`prompts.py`). The negative prompt
    defaults to none. Height, width and the number of frames may differ from the native 32 x 32 x 24
    (multiples of 16 for height and width); positions are rotary.
    """

    _optional_components: ClassVar[list[str]] = ["transformer", "transformer_2", "text_encoder", "tokenizer"]

    def __init__(
        self,
        tokenizer,
        text_encoder,
        vae,
        scheduler,
        transformer=None,
        transformer_2=None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ):
        super().__init__(
            tokenizer, text_encoder, vae, scheduler, transformer, transformer_2, boundary_ratio, expand_timesteps
        )
        if self.vae_scale_factor_temporal == 1:
            self.vae_scale_factor_temporal = _EveryFrameCount(1)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = FRAME_SIZE,
        width: int = FRAME_SIZE,
        num_frames: int = NATIVE_FRAMES,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        **kwargs,
    ):
        """WanPipeline's own call; only the defaults are those of the digits."""
        return super().__call__(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **kwargs,
        )

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts -> embeddings [N, 1, TEXT_DIM] of the prompts and, with guidance, of their negatives.

        Raises ValueError for a prompt that does not name exactly one digit, and for a list of
        negative prompts whose length differs from that of the prompts.
        """
        dtype = dtype or self.transformer.dtype

        def embed(classes: list[int]) -> torch.Tensor:
            labels = torch.tensor(classes, dtype=torch.int64, device=device)
            return embed_labels(labels.repeat_interleave(num_videos_per_prompt), dtype)

        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts:
                raise ValueError("the list of prompts is empty")
            count = len(prompts)
            prompt_embeds = embed([parse_digit(text) for text in prompts])
        else:
            count = len(prompt_embeds)
            prompt_embeds = prompt_embeds.to(device=device, dtype=dtype)

        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device=device, dtype=dtype)
        elif do_classifier_free_guidance:
            negatives = [negative_prompt] * count if not isinstance(negative_prompt, list) else negative_prompt
            if len(negatives) != count:
                raise ValueError(f"expected {count} negative prompts, one a prompt, got {len(negatives)}")
            negative_prompt_embeds = embed([parse_digit(text) if text else NULL_CLASS for text in negatives])
        return prompt_embeds, negative_prompt_embeds


def all_labels(count: int) -> list[int]:
    """Labels 0, 1, ... 9, 0, 1, ...: `count` of them, every digit equally often."""
    return [i % NUM_CLASSES for i in range(count)]
