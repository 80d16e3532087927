"""ParaTAA inside pipelines: the sequential result, in rounds; loop, callbacks and random numbers are kept."""

from __future__ import annotations

import inspect
import json
import logging

import pytest
import torch
from patching import CALL_TRACES, assert_restored, snapshot
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
from triskele.diffusers import pace

TIGHT = dict(tolerance=1e-7)
STEPS = 8


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(got, want, tolerance=1e-4):
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = max(1.0, float(want.abs().max()))
    assert float((got - want).abs().max()) <= tolerance * scale


def parallel_equals_sequential(pipe, call, steps=STEPS, window=4, config=None, **kwargs):
    """Runs both; returns the SampleRuns."""
    want = call(pipe, steps=steps, **kwargs)
    with tk.patch(pipe, sampler=config or tk.ParaTAA(window=window, **TIGHT)) as handle:
        got = call(pipe, steps=steps, **kwargs)
        runs = list(handle.sampler.last)
    assert_same(got, want)
    assert all(run.converged for run in runs) and len(runs) > 0
    assert torch.equal(call(pipe, steps=steps, **kwargs), want)
    return runs


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
    assert_same(got, want, tolerance=1e-3)      # one ulp can move a routing decision or a rounding to 8 bits
    assert float((call(pipe, steps=5) - want).abs().max()) > 0


# ---- the loop stays the pipeline's -----------------------------------------------------------------------------------

def test_restore_brings_the_same_scheduler_back():
    pipe = unet_pipeline()
    unet_call(pipe)
    before, scheduler = snapshot(pipe), pipe.scheduler
    state = dict(vars(scheduler))
    handle = tk.patch(pipe, sampler=tk.ParaTAA(window=2))
    assert pipe.scheduler is not scheduler
    unet_call(pipe)
    handle.restore()
    assert pipe.scheduler is scheduler and all(vars(scheduler)[k] is v for k, v in state.items())
    assert_restored(pipe, before, volatile=CALL_TRACES)
    assert not pipe.unet._forward_pre_hooks


def test_stand_in_passes_for_the_scheduler(tmp_path):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    pipe = unet_pipeline()
    plain = pipe.scheduler
    tk.patch(pipe, sampler=tk.ParaTAA(window=2))
    assert isinstance(pipe.scheduler, DDIMScheduler) and type(pipe.scheduler).__name__ == "DDIMScheduler"
    for method in ("step", "set_timesteps", "scale_model_input"):
        assert inspect.signature(getattr(pipe.scheduler, method)) == inspect.signature(getattr(plain, method))
    pipe.scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    assert dict(DPMSolverMultistepScheduler.from_config(pipe.scheduler.config).config)["beta_end"] == 0.02
    pipe.scheduler.set_timesteps(10)
    plain.set_timesteps(10)
    timesteps = pipe.scheduler.timesteps
    assert len(timesteps) == 10 and torch.equal(timesteps, plain.timesteps) and timesteps[3] == plain.timesteps[3]
    assert [int(t) for t in timesteps] == plain.timesteps.tolist()     # a loop that never steps sees them all
    assert type(timesteps[2:]) is torch.Tensor and type(timesteps + 1) is torch.Tensor


def test_own_loop_over_the_timesteps():
    pipe = unet_pipeline()

    def loop():
        g = torch.Generator().manual_seed(0)
        x, text = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 7, 16, generator=g)
        pipe.scheduler.set_timesteps(8)
        turns = 0
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(pipe.unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
                turns += 1
        return x, turns

    want, _ = loop()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=None, tolerance=1e-2)) as handle:
        got, turns = loop()
    assert turns == handle.sampler.last[0].iterations
    assert_same(got, want, 5e-2)


def test_own_loop_that_gives_the_model_another_timestep():
    pipe = unet_pipeline()
    x, text = torch.ones(1, 4, 16, 16), torch.ones(1, 7, 16)
    with tk.patch(pipe, sampler=tk.ParaTAA(window=4)):
        pipe.scheduler.set_timesteps(8)
        with pytest.raises(ValueError, match="timestep of UNet2DConditionModel: expected 876 at the scheduler's 876"):
            for t in pipe.scheduler.timesteps:
                pipe.unet(x, 1000 - t, encoder_hidden_states=text)
        with pytest.raises(ValueError, match="encoder_hidden_states of UNet2DConditionModel: expected 3 rows"):
            for t in pipe.scheduler.timesteps:
                pipe.unet(x.expand(3, -1, -1, -1), t, encoder_hidden_states=text.expand(2, -1, -1))


def test_loop_over_a_slice_is_sequential_and_says_so(caplog):
    pipe = unet_pipeline()

    def loop():
        x, text = torch.ones(1, 4, 16, 16), torch.ones(1, 7, 16)
        pipe.scheduler.set_timesteps(8)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps[3:]:
                x = pipe.scheduler.step(pipe.unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
        return x

    want = loop()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=4)), caplog.at_level(logging.WARNING, "triskele"):
        assert torch.equal(loop(), want) and torch.equal(loop(), want)
    assert [r.message for r in caplog.records if "slice" in r.message] == [caplog.records[0].message]


def test_scheduler_replaced_after_patching(caplog):
    from diffusers import DPMSolverMultistepScheduler

    pipe = unet_pipeline()
    plain = pipe.scheduler
    with tk.patch(pipe, sampler=tk.ParaTAA(window=4)):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        want = unet_call(pipe, steps=4)
        assert [r.message[:38] for r in caplog.records] == ["ParaTAA: pipe.scheduler was replaced a"]
    assert pipe.scheduler is plain
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(plain.config)
    assert torch.equal(unet_call(pipe, steps=4), want)


def test_single_step_is_sequential():
    pipe = unet_pipeline()
    want = unet_call(pipe, steps=1)
    with tk.patch(pipe, sampler=tk.ParaTAA(window=4)) as handle:
        assert torch.equal(unet_call(pipe, steps=1), want)
        assert handle.sampler.last == []


def test_callbacks_see_every_round_and_may_not_change_latents():
    pipe = unet_pipeline()
    seen = []

    def look(_pipe, step, timestep, kwargs):
        seen.append((step, int(timestep), kwargs["latents"].clone()))
        return {}

    def change(_pipe, _step, _timestep, kwargs):
        return {"latents": kwargs["latents"] + 1}

    want = unet_call(pipe, steps=6)
    with tk.patch(pipe, sampler=tk.ParaTAA(window=3, **TIGHT)) as handle:
        got = unet_call(pipe, steps=6, callback_on_step_end=look)
        assert [step for step, *_ in seen] == list(range(handle.sampler.last[0].iterations))
        assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
        assert torch.equal(seen[-1][2], got)
        with pytest.raises(ValueError, match="latents changed between two rounds"):
            unet_call(pipe, steps=6, callback_on_step_end=change)
        assert_same(unet_call(pipe, steps=6), want)


def test_interrupt_ends_the_call():
    pipe = unet_pipeline()

    def stop(pipe, step, _timestep, _kwargs):
        pipe._interrupt = step == 1
        return {}

    with tk.patch(pipe, sampler=tk.ParaTAA(window=3, **TIGHT)) as handle:
        out = unet_call(pipe, steps=6, callback_on_step_end=stop)
        assert torch.isfinite(out).all()
        assert handle.sampler.last[0].iterations == 2 and not handle.sampler.last[0].converged


def test_exception_in_the_loop_leaves_nothing_behind():
    pipe = unet_pipeline()
    want = unet_call(pipe, steps=6)
    inputs = dict(sample=torch.ones(2, 4, 16, 16), timestep=torch.tensor(5), encoder_hidden_states=torch.ones(2, 7, 16))
    plain = pipe.unet(**inputs).sample

    def fail(_pipe, step, _timestep, _kwargs):
        if step == 1:
            raise KeyboardInterrupt("stopped by the user")
        return {}

    with tk.patch(pipe, sampler=tk.ParaTAA(window=3, **TIGHT)) as handle:
        with pytest.raises(KeyboardInterrupt):
            unet_call(pipe, steps=6, callback_on_step_end=fail)
        assert not handle.sampler.parallel
        assert torch.equal(pipe.unet(**inputs).sample, plain)      # not widened
        forward, calls = pipe.unet.forward, []

        def broken(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("out of luck")
            return forward(*args, **kwargs)

        pipe.unet.forward = broken
        with pytest.raises(RuntimeError, match="out of luck"):
            unet_call(pipe, steps=6)
        del pipe.unet.forward
        assert torch.equal(pipe.unet(**inputs).sample, plain)
        with pytest.raises(ValueError, match="prompt"):
            pipe()
        assert_same(unet_call(pipe, steps=6), want)


def test_a_broken_model_is_named_with_its_round():
    pipe = unet_pipeline()
    handle = tk.patch(pipe, sampler=tk.ParaTAA(window=3))
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="round 1, timestep"):
        unet_call(pipe, steps=6)
    handle.restore()


def test_max_iterations_is_reported(caplog):
    pipe = unet_pipeline()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=None, max_iterations=2, **TIGHT)) as handle:
        unet_call(pipe, steps=6)
        assert handle.sampler.last[0].iterations == 2 and not handle.sampler.last[0].converged
    assert any("had not converged" in r.message for r in caplog.records)


def test_compiled_transformer():
    pipe = flux_pipeline(layers=1, single_layers=0)
    want = flux_call(pipe, steps=2)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", dynamic=False)
    with tk.patch(pipe, sampler=tk.ParaTAA(window=2, **TIGHT)) as handle:
        assert_same(flux_call(pipe, steps=2), want)
        assert handle.sampler.last[0].converged


# ---- pace ------------------------------------------------------------------------------------------------------------

def test_choose_takes_a_window_where_rows_are_free_and_none_where_they_cost():
    asked = []

    def free(rows):
        asked.append(rows)
        return 1.0

    found, line = pace.choose(free, 50)
    assert found.window == 16 and asked == [1, 1, 4, 8, 16, 32] and "window 16, expected 5.6x" in line
    found, line = pace.choose(lambda rows: float(rows), 50)
    assert found.window is None and "sequential sampling is faster" in line and "\n" not in line
    found, _ = pace.choose(lambda rows: max(1.0, rows / 8), 50)
    assert found.window == 8


def test_choose_stops_at_the_memory():
    def seconds(rows):
        if rows > 4:
            raise torch.OutOfMemoryError("no")
        return 1.0

    found, line = pace.choose(seconds, 50)
    assert found.window == 4 and "do not fit" in line


@pytest.mark.parametrize("cost, parallel", [(0.0, True), (1.0, False)])
def test_auto_measures_once_a_shape(monkeypatch, caplog, cost, parallel):
    from triskele.diffusers.rounds import Run

    asked = []

    def timed(self, call, window):
        asked.append(window)
        return 1e3 + 1e3 * cost * (window - 1)

    monkeypatch.setattr(Run, "_timed", timed)
    pipe = unet_pipeline()
    want = unet_call(pipe, steps=16)
    config = tk.ParaTAA(window="auto", **TIGHT)
    with tk.patch(pipe, sampler=config) as handle, caplog.at_level(logging.INFO, "triskele"):
        for _ in range(2):
            got = unet_call(pipe, steps=16)
            assert_same(got, want)
            assert bool(handle.sampler.last) == parallel
            assert parallel or torch.equal(got, want)
    assert asked == ([1, 1, 4, 8] if parallel else [1, 1, 4])
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == (logging.INFO if parallel else logging.WARNING)


def test_auto_really_measures_and_keeps_the_result():
    pipe = flux_pipeline()
    want = flux_call(pipe, steps=6)
    with tk.patch(pipe, sampler=tk.ParaTAA(**TIGHT)):
        assert_same(flux_call(pipe, steps=6), want)
        assert_same(flux_call(pipe, steps=6), want)


@pytest.mark.parametrize("window, then", [(4, 1), ("auto", 0)])
def test_slower_than_sequential_is_said_once(monkeypatch, caplog, window, then):
    from triskele.diffusers.rounds import Run

    monkeypatch.setattr(Run, "_timed", lambda self, call, rows: 1e-6 / rows)
    pipe = unet_pipeline()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=window)) as handle, caplog.at_level(logging.WARNING, "triskele"):
        for _ in range(2):
            unet_call(pipe, steps=6)
        assert len(handle.sampler.last) == then
    lines = [r.message for r in caplog.records]
    assert len(lines) == 1 and "6 sequential steps would take about" in lines[0]


# ---- refusals --------------------------------------------------------------------------------------------------------

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
