"""ParaTAA inside pipelines: what it refuses, and that nothing has changed then."""

from __future__ import annotations

import pytest
import torch
from patching import assert_restored, snapshot
from sampler_runs import one_thread  # noqa: F401  (a fixture)
from tiny import dit_pipeline, unet_pipeline, wan_call, wan_pipeline

import triskele as tk


def _refused(pipe, match, config=None):
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=match):
        tk.patch(pipe, sampler=config or tk.ParaTAA(window=4))
    assert_restored(pipe, before)


def test_refuses_two_transformers():
    from diffusers import WanPipeline
    from tiny import wan_model

    plain = wan_pipeline()
    parts = dict(tokenizer=None, text_encoder=None, vae=plain.vae, scheduler=plain.scheduler, transformer=wan_model(),
                 transformer_2=wan_model())
    _refused(WanPipeline(**parts, boundary_ratio=0.5), "by the timestep")
    _refused(WanPipeline(**parts), "two transformers")


def test_refuses_a_nonlinear_scheduler():
    from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler

    pipe = dit_pipeline()
    pipe.scheduler = DDPMScheduler()
    _refused(pipe, "clip_sample")
    pipe.scheduler = DDIMScheduler(clip_sample=False, thresholding=True)
    _refused(pipe, "thresholding")
    pipe.scheduler = EulerAncestralDiscreteScheduler()           # linear: noise is one term
    tk.patch(pipe, sampler=tk.ParaTAA(window=4)).restore()


def test_refuses_a_cache_before_and_after():
    from diffusers import FirstBlockCacheConfig

    pipe = wan_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        tk.patch(pipe, sampler=tk.ParaTAA(window=4))
    pipe.transformer.disable_cache()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=4)):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(ValueError, match="disable_cache"):
            wan_call(pipe, steps=4)
        pipe.transformer.disable_cache()
        wan_call(pipe, steps=4)


def test_refuses_an_untried_pipeline():
    from diffusers import StableDiffusionImg2ImgPipeline

    plain = unet_pipeline()
    pipe = StableDiffusionImg2ImgPipeline(vae=plain.vae, text_encoder=None, tokenizer=None, unet=plain.unet,
                                          scheduler=plain.scheduler, safety_checker=None, feature_extractor=None,
                                          requires_safety_checker=False)
    _refused(pipe, "expected one of the pipelines .*StableDiffusionPipeline.* got StableDiffusionImg2ImgPipeline")


def test_refuses_dense_steps():
    pipe = wan_pipeline()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="dense_steps"):
        tk.patch(pipe, attention=tk.VMoBA(top_k=2, dense_steps=0.3), sampler=tk.ParaTAA(window=4))
    assert_restored(pipe, before)


def test_refuses_patching_twice():
    pipe = unet_pipeline()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=4)), pytest.raises(ValueError, match="restore"):
        tk.patch(pipe, sampler=tk.ParaTAA(window=4))


def test_refuses_arguments_that_it_cannot_repeat():
    pipe = wan_pipeline()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=4)), pytest.raises(ValueError, match="called with attention_kwargs"):
        wan_call(pipe, steps=4, attention_kwargs={"mask": torch.ones(1)})


def test_refuses_a_model_without_a_loop():
    with pytest.raises(ValueError, match="a pipeline"):
        tk.patch(wan_pipeline().transformer, sampler=tk.ParaTAA(window=4))
