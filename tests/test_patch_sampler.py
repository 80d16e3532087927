"""ParaTAA inside pipelines: the sequential result, in rounds, in every family and scheduler."""

from __future__ import annotations

import pytest
import torch
from sampler_runs import STEPS, TIGHT, assert_same, one_thread, parallel_equals_sequential  # noqa: F401  (a fixture)
from tiny import (
    FAMILIES,
    dit_call,
    dit_pipeline,
    flux_call,
    flux_pipeline,
    unet_call,
    unet_pipeline,
    wan_call,
    wan_pipeline,
)

import triskele as tk


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [3, None])
def test_every_family_equals_its_sequential_self(family, window):
    *_, pipeline, call = FAMILIES[family]
    for run in parallel_equals_sequential(pipeline(), call, window=window):
        assert run.iterations <= STEPS
        assert run.nfe >= STEPS
        assert run.window == (window or STEPS)
        assert len(run.history) == run.iterations


@pytest.mark.parametrize("family, kwargs", [
    ("dit", dict(guidance_scale=1.0)), ("dit", dict(class_labels=[5], guidance_scale=1.0)),
    ("unet", dict(guidance_scale=0.0)), ("unet", dict(num_images_per_prompt=2)), ("unet", dict(guidance_rescale=0.7)),
    ("wan", dict(guidance_scale=1.0)), ("wan", dict(num_videos_per_prompt=2)),
    ("flux", dict(num_images_per_prompt=2)), ("pixart", dict(guidance_scale=1.0)),
])
def test_guidance_and_batch(family, kwargs):
    *_, pipeline, call = FAMILIES[family]
    parallel_equals_sequential(pipeline(), call, steps=6, **kwargs)


def test_flux_true_guidance():
    g = torch.Generator().manual_seed(5)
    negative = dict(negative_prompt_embeds=torch.randn(1, 7, 16, generator=g),
                    negative_pooled_prompt_embeds=torch.randn(1, 8, generator=g), true_cfg_scale=2.0)
    parallel_equals_sequential(flux_pipeline(), flux_call, steps=6, **negative)


def test_flux_dynamic_shift_reaches_the_equations():
    """`mu` and sigmas, which the pipeline gives to set_timesteps, change the schedule."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = flux_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parallel_equals_sequential(pipe, flux_call, steps=6)
    parallel_equals_sequential(pipe, flux_call, steps=None, sigmas=[1.0, 0.8, 0.5, 0.2])


def _schedulers():
    import diffusers as d

    common = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    yield "ddim-v", d.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **common)
    yield "ddpm", d.DDPMScheduler(clip_sample=False, **common)
    yield "dpm++", d.DPMSolverMultistepScheduler(**common)
    yield "dpm++karras", d.DPMSolverMultistepScheduler(use_karras_sigmas=True, **common)
    yield "sde-dpm++", d.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, **common)
    yield "unipc", d.UniPCMultistepScheduler(**common)
    yield "euler", d.EulerDiscreteScheduler(**common)         # its input is scaled by 1 / sqrt(sigma^2 + 1)
    yield "pndm", d.PNDMScheduler(skip_prk_steps=True, **common)
    yield "deis", d.DEISMultistepScheduler(**common)


@pytest.mark.parametrize("name, scheduler", _schedulers(), ids=lambda v: v if isinstance(v, str) else "")
def test_schedulers(name, scheduler):
    pipe = unet_pipeline()
    pipe.scheduler = scheduler
    runs = parallel_equals_sequential(pipe, unet_call, steps=6)
    assert runs[0].iterations <= 7


@pytest.mark.parametrize("make", ["flow", "dpm-flow"])
def test_wan_on_flow_schedulers(make):
    import diffusers as d

    pipe = wan_pipeline()
    pipe.scheduler = {"flow": d.FlowMatchEulerDiscreteScheduler(shift=3.0),
                      "dpm-flow": d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                                flow_shift=3.0)}[make]
    parallel_equals_sequential(pipe, wan_call, steps=6)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_draws_the_same_noise(eta):
    parallel_equals_sequential(unet_pipeline(), unet_call, steps=6, eta=eta)


def test_noise_of_a_list_of_generators_and_state_afterwards():
    pipe = unet_pipeline()
    g = torch.Generator().manual_seed(3)
    embeds, negative = torch.randn(2, 2, 7, 16, generator=g).unbind(0)

    def call():
        generators = [torch.Generator().manual_seed(s) for s in (11, 12)]
        out = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=6, eta=1.0, height=32,
                   width=32, generator=generators, output_type="latent", return_dict=False)[0]
        return out, [generator.get_state() for generator in generators]

    want, states = call()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=3, **TIGHT)):
        got, after = call()
    assert_same(got, want)
    assert all(torch.equal(a, b) for a, b in zip(states, after))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dit_draws_from_the_global_generator(guidance):
    """DiTPipeline steps guidance's copy of the latents too, with noise of its own that it then throws away."""
    from diffusers import DDPMScheduler

    pipe = dit_pipeline()
    pipe.scheduler = DDPMScheduler(clip_sample=False)

    def call(pipe, steps, **kwargs):
        torch.manual_seed(7)
        return dit_call(pipe, steps, guidance_scale=guidance, **kwargs)

    assert len(parallel_equals_sequential(pipe, call, steps=6)) == 2
    parallel_equals_sequential(pipe, call, steps=6, class_labels=[4])


def test_default_tolerance_takes_fewer_rounds_than_steps():
    pipe = flux_pipeline()
    want = flux_call(pipe, steps=40)
    handle = tk.patch(pipe, sampler=tk.ParaTAA(window=8))
    got = flux_call(pipe, steps=40)
    (run,) = handle.sampler.last
    assert run.converged and run.iterations < 30
    assert_same(got, want, tolerance=1e-2)
    residuals = [h["residual"] for h in run.history]
    assert residuals[-1] <= 1e-3 < residuals[0]
    assert torch.equal(run.history[-1]["sample"], got[0])


def test_samples_of_a_batch_go_at_their_own_pace():
    """Windows of different lengths in one call."""
    pipe = flux_pipeline()
    call = dict(steps=40, num_images_per_prompt=3)
    want = flux_call(pipe, **call)
    with tk.patch(pipe, sampler=tk.ParaTAA(window=8)) as handle:
        got = flux_call(pipe, **call)
        assert len({run.nfe for run in handle.sampler.last}) > 1
    assert_same(got, want, tolerance=1e-2)


def test_bfloat16_transformer_keeps_float32_latents():
    pipe = wan_pipeline()
    pipe.transformer.to(torch.bfloat16)
    want = wan_call(pipe, steps=6)
    assert want.dtype == torch.float32
    with tk.patch(pipe, sampler=tk.ParaTAA(window=3, **TIGHT)):
        got = wan_call(pipe, steps=6)
    assert_same(got, want, tolerance=2e-2)   # the model's rounding, at other batch sizes


def test_image_to_video_condition_stays_with_its_rows():
    """WanImageToVideoPipeline puts the image's channels behind the latents."""
    from diffusers import WanImageToVideoPipeline
    from tiny import wan_model

    plain = wan_pipeline()
    pipe = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=plain.vae, scheduler=plain.scheduler,
                                   transformer=wan_model(in_channels=12))
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    parallel_equals_sequential(pipe, wan_call, steps=5, image=image)


def test_sdxl_repeats_its_added_conditions():
    """A dict of tensors among the model's arguments."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from tiny import unet_model

    unet = unet_model(addition_embed_type="text_time", addition_time_embed_dim=4,
                      projection_class_embeddings_input_dim=32)
    pipe = StableDiffusionXLPipeline(
        vae=unet_pipeline().vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=EulerDiscreteScheduler(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(5)
    pooled = dict(pooled_prompt_embeds=torch.randn(1, 8, generator=g),
                  negative_pooled_prompt_embeds=torch.randn(1, 8, generator=g))
    parallel_equals_sequential(pipe, unet_call, steps=5, **pooled)


@pytest.mark.parametrize("family, arms", [
    ("wan", dict(attention=tk.SLA(keep=0.25, block_q=16, block_k=16), linear=tk.SVDQuant(rank=4))),
    ("wan", dict(attention=tk.VMoBA(top_k=2, chunks=(1, (4, 4), (1, 4, 4))))),
    ("flux", dict(attention=tk.SLA(keep=0.25, block_q=16, block_k=16))),
    ("unet", dict(linear=tk.SVDQuant(rank=4))),
])
def test_with_the_other_arms(family, arms):
    """Rows do not see each other: routing, selection and token scales are per sample."""
    *_, pipeline, call = FAMILIES[family]
    pipe = pipeline()
    with tk.patch(pipe, **arms):
        want = call(pipe, steps=5)
    with tk.patch(pipe, **arms, sampler=tk.ParaTAA(window=3, **TIGHT)) as handle:
        got = call(pipe, steps=5)
        assert handle.sampler.last[0].converged
    # One ulp can move a routing decision, or a rounding to 8 bits: a step of 1/127 of a token's largest value.
    assert_same(got, want, tolerance=5e-3)
    assert float((call(pipe, steps=5) - want).abs().max()) > 0
