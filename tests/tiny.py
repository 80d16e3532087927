"""Tiny random pipelines of every family, built offline: no hub, no text encoder (the calls pass prompt_embeds).

Weights are random and not zero anywhere: diffusers starts some output layers at zero, which would hide any error.
"""

from __future__ import annotations

import torch


def _stir(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random, scaled so that activations stay of order one and attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            keep = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0  # gains of norms stay near one
            parameter.copy_(keep + scale * noise)
    return model.eval()


def wan_model(layers: int = 2, seed: int = 0, **config):
    from diffusers import WanTransformer3DModel

    config = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                  text_dim=16, freq_dim=32, ffn_dim=32, num_layers=layers, rope_max_seq_len=32) | config
    return _stir(WanTransformer3DModel(**config), seed)


def wan_inputs(batch: int = 1, frames: int = 3, height: int = 8, width: int = 12, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    return dict(hidden_states=torch.randn(batch, 4, frames, height, width, generator=g),
                timestep=torch.full((batch,), 700.0), encoder_hidden_states=torch.randn(batch, 7, 16, generator=g))


def wan_pipeline(layers: int = 2):
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                           temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _quiet(WanPipeline(tokenizer=None, text_encoder=None, vae=_stir(vae), scheduler=scheduler,
                              transformer=wan_model(layers)))


def wan_call(pipe, steps: int = 2, **kwargs) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    embeds, negative = torch.randn(2, 1, 7, 16, generator=g).unbind(0)
    call = dict(height=64, width=96, num_frames=9, guidance_scale=3.0, output_type="latent") | kwargs
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0), return_dict=False, **call)[0]


def dit_model(layers: int = 2, seed: int = 0, **config):
    from diffusers import DiTTransformer2DModel

    config = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=layers,
                  sample_size=16, patch_size=2, num_embeds_ada_norm=1000) | config
    return _stir(DiTTransformer2DModel(**config), seed)


def dit_inputs(batch: int = 2, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    return dict(hidden_states=torch.randn(batch, 4, 16, 16, generator=g), timestep=torch.full((batch,), 500),
                class_labels=torch.arange(batch) + 3)


def dit_pipeline(layers: int = 2):
    from diffusers import DDIMScheduler, DiTPipeline

    return _quiet(DiTPipeline(dit_model(layers), _vae(), DDIMScheduler(clip_sample=False), id2label={3: "three"}))


def dit_call(pipe, steps: int = 2, **kwargs) -> torch.Tensor:
    """The images (DiTPipeline has no latent output), [B, 3, h, w]."""
    call = dict(class_labels=[3, 7], guidance_scale=3.0) | kwargs
    return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt",
                return_dict=False, **call)[0]


def pixart_model(layers: int = 2, seed: int = 0, **config):
    from diffusers import PixArtTransformer2DModel

    config = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=layers,
                  cross_attention_dim=24, caption_channels=16, sample_size=16, patch_size=2,
                  use_additional_conditions=False) | config
    return _stir(PixArtTransformer2DModel(**config), seed)


def pixart_inputs(batch: int = 2, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    return dict(hidden_states=torch.randn(batch, 4, 16, 16, generator=g), timestep=torch.full((batch,), 500),
                encoder_hidden_states=torch.randn(batch, 7, 16, generator=g),
                encoder_attention_mask=torch.ones(batch, 7),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None})


def pixart_pipeline(layers: int = 2):
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    return _quiet(PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=_vae(), transformer=pixart_model(layers),
                                      scheduler=DPMSolverMultistepScheduler()))


def pixart_call(pipe, steps: int = 2, **kwargs) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    embeds, negative = torch.randn(2, 1, 7, 16, generator=g).unbind(0)
    mask = torch.ones(1, 7)
    call = dict(height=32, width=48, guidance_scale=3.0, output_type="latent") | kwargs
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, prompt_attention_mask=mask,
                negative_prompt_attention_mask=mask, negative_prompt=None, use_resolution_binning=False,
                num_inference_steps=steps, generator=torch.Generator().manual_seed(0), return_dict=False, **call)[0]


def flux_model(layers: int = 1, single_layers: int = 2, seed: int = 0, **config):
    from diffusers import FluxTransformer2DModel

    config = dict(patch_size=1, in_channels=16, num_layers=layers, num_single_layers=single_layers,
                  attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
                  axes_dims_rope=(4, 4, 8), guidance_embeds=True) | config
    return _stir(FluxTransformer2DModel(**config), seed)


def flux_inputs(batch: int = 1, height: int = 8, width: int = 12, text: int = 7, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return dict(hidden_states=torch.randn(batch, height * width, 16, generator=g),
                encoder_hidden_states=torch.randn(batch, text, 16, generator=g),
                pooled_projections=torch.randn(batch, 8, generator=g), timestep=torch.full((batch,), 0.7),
                img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(text, 3), guidance=torch.full((batch,), 3.5))


def flux_pipeline(layers: int = 1, single_layers: int = 2):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return _quiet(FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=flux_model(layers, single_layers)))


def flux_call(pipe, steps: int = 2, **kwargs) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    call = dict(height=32, width=48, output_type="latent") | kwargs
    return pipe(prompt_embeds=torch.randn(1, 7, 16, generator=g), pooled_prompt_embeds=torch.randn(1, 8, generator=g),
                num_inference_steps=steps, generator=torch.Generator().manual_seed(0), return_dict=False, **call)[0]


def unet_model(seed: int = 0, **config):
    from diffusers import UNet2DConditionModel

    config = dict(block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=2,
                  norm_num_groups=4) | config
    return _stir(UNet2DConditionModel(**config), seed)


def unet_inputs(batch: int = 2, height: int = 16, width: int = 16, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    return dict(sample=torch.randn(batch, 4, height, width, generator=g), timestep=torch.full((batch,), 500),
                encoder_hidden_states=torch.randn(batch, 7, 16, generator=g))


def unet_pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return _quiet(StableDiffusionPipeline(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=unet_model(), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False))


def unet_call(pipe, steps: int = 2, **kwargs) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    embeds, negative = torch.randn(2, 1, 7, 16, generator=g).unbind(0)
    call = dict(height=32, width=48, guidance_scale=3.0, output_type="latent") | kwargs
    return pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0), return_dict=False, **call)[0]


FAMILIES = {
    "wan": (wan_model, wan_inputs, wan_pipeline, wan_call),
    "dit": (dit_model, dit_inputs, dit_pipeline, dit_call),
    "pixart": (pixart_model, pixart_inputs, pixart_pipeline, pixart_call),
    "flux": (flux_model, flux_inputs, flux_pipeline, flux_call),
    "unet": (unet_model, unet_inputs, unet_pipeline, unet_call),
}
"""family -> (model(), inputs of its forward, pipeline(), call(pipeline, steps=2))."""


def _vae():
    """A KL autoencoder with two levels (each side halved once)."""
    from diffusers import AutoencoderKL

    return _stir(AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 8), layers_per_block=1,
        norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
