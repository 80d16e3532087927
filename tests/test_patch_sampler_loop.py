"""ParaTAA inside pipelines: loop, callbacks, scheduler and random numbers stay the pipeline's."""

from __future__ import annotations

import inspect
import json
import logging

import pytest
import torch
from patching import CALL_TRACES, assert_restored, snapshot
from sampler_runs import TIGHT, assert_same, one_thread  # noqa: F401  (a fixture)
from tiny import flux_call, flux_pipeline, unet_call, unet_pipeline

import triskele as tk


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
