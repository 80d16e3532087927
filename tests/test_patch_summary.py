"""What `summary()` says of backends: on a machine that has a GPU too, and of the model as it stands."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
import tiny
import torch
from sampler_runs import one_thread  # noqa: F401  (a fixture)

import triskele as tk
from triskele import backend
from triskele.diffusers import explain as probes
from triskele.diffusers import linear, modulation, sampler
from triskele.ops.sla import cuda_backend

ARMS = {
    "SLA": dict(attention=tk.SLA(keep=0.5)), "VMoBA": dict(attention=tk.VMoBA()),
    "SLA, alpha": dict(attention=tk.SLA(keep=0.5, linear="alpha")),
    "SLA, none": dict(attention=tk.SLA(keep=0.5, linear="none")),
    **{f"linear, {activation}": dict(linear=tk.SVDQuant(rank=4, iterations=1, format=format, activation=activation))
       for format, activation in (("int4", "int8"), ("int4", "int4"), ("nvfp4", "none"), ("nvfp4", "fp8"))},
    "sampler": dict(sampler=tk.ParaTAA(window=2)), "sampler, auto": dict(sampler=tk.ParaTAA(memory=7)),
}


@pytest.fixture
def played_gpu(monkeypatch):
    """CUDA's and Triton's entries take the CPU's tensors and lack nothing: all of them are asked, as on a GPU."""
    import triskele.ops  # noqa: F401  enters the tables

    monkeypatch.setattr(backend.Backend, "device_type", property(lambda b: None if b.name == "reference" else "cpu"))
    monkeypatch.setattr(backend, "architecture", lambda _device: "sm90")
    for op, table in backend.TABLES.items():
        monkeypatch.setitem(backend.TABLES, op, tuple(dataclasses.replace(b, missing=list) for b in table))


@pytest.fixture
def asked(monkeypatch):
    """(op, inputs) of every probe."""
    seen, explain = [], backend.explain

    def recording(op, *inputs, **kwargs):
        seen.append((op, inputs))
        return explain(op, *inputs, **kwargs)
    for module in (probes, linear, sampler, modulation):
        monkeypatch.setattr(module, "explain", recording)
    return seen


@pytest.mark.parametrize("family", ["wan", "dit"])
@pytest.mark.parametrize("arms", ARMS)
def test_every_arm_on_a_machine_with_a_gpu(arms, family, played_gpu, asked):
    pipe = tiny.FAMILIES[family][2]()
    with tk.patch(pipe, **ARMS[arms]) as handle:
        text = str(handle.summary())
    assert "live" in text and asked
    for op, inputs in asked:    # every entry of the table is asked, not only those before the chosen one
        for entry in backend.TABLES[op]:
            assert isinstance(entry.why_not(*inputs), list)
            if entry.run.__name__ != "<lambda>":    # the launcher takes what the probe gave
                inspect.signature(entry.run).bind(*inputs)
        assert str(backend.explain(op, *inputs, backend="cuda")).startswith(op)
    assert len(tk.backends()) >= 40 and all(row.runs_here for row in tk.backends())
    if arms == "sampler":
        assert "on cuda" in text and {op for op, _ in asked} == {"taa.residual", "adaln.modulate"}
    if arms == "sampler, auto":
        assert "not cuda: takes memory up to 5, got 7" in text and "not triton: takes memory up to 5, got 7" in text


def test_probes_give_what_calls_give(monkeypatch, asked, one_thread):  # noqa: F811
    """As many inputs, of the same kinds, as the op hands to its backends."""
    calls = {}
    explain = backend.explain

    def spy(op, *inputs, **kwargs):
        calls.setdefault(op, inputs)
        return explain(op, *inputs, **kwargs)
    monkeypatch.setattr(backend, "explain", spy)    # as `select` finds it; the probes have theirs by name
    monkeypatch.setattr(modulation, "LEAST_ELEMENTS", 0)
    for arms in ("SLA", "VMoBA", "linear, int8", "sampler"):
        pipe = tiny.dit_pipeline()
        with tk.patch(pipe, **ARMS[arms]) as handle:
            handle.summary()
            tiny.dit_call(pipe)
    assert {op for op, _ in asked} == {"sla.forward", "vmoba.attention", "svdq.w4a8", "taa.residual", "adaln.modulate"}
    for op, inputs in asked:
        real = calls[op]
        assert len(inputs) == len(real), op
        for mine, theirs in zip(inputs, real):
            assert mine is None or theirs is None or isinstance(mine, type(theirs)), op
            if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
                assert mine.dim() == theirs.dim() and mine.dtype == theirs.dtype, op


@pytest.mark.parametrize("block_q, block_k", [(128, 64), (64, 64), (64, 32), (256, 64)])
def test_the_probe_of_sla_refuses_as_a_long_call_does(block_q, block_k):
    def why(*tokens):
        q, k = (torch.zeros(1, 1, n, 64, dtype=torch.bfloat16) for n in tokens)
        return cuda_backend.why_not(q, k, k, None, None, None, None, None, settings, False)

    config = tk.SLA(block_q=block_q, block_k=block_k)
    _, (q, k, *rest) = probes._sla(config, torch.device("cpu"), torch.bfloat16, 64)
    settings = rest[-2]
    assert why(q.shape[2], k.shape[2]) == why(4096, 4096)
    assert bool(why(4096, 4096)) == ((block_q, block_k) != (128, 64))


def test_summary_follows_the_model():
    model = tiny.dit_model(layers=1)
    with tk.patch(model, attention=tk.SLA(), linear=tk.SVDQuant(rank=2, iterations=1)) as handle:
        assert "SLA on cpu" in handle.summary()
        torch.nn.Module.half(model)     # diffusers' own refuses a quantized model
        text = handle.summary()
        assert "SLA: no backend takes it yet" in text and "not cpu: takes float32 and bfloat16" in text
        model.to("meta")
        assert {row.backend for row in handle.replaced} == {""}
    model = tiny.dit_model(layers=1)
    handle = tk.patch(model, attention=tk.SLA())
    handle.restore()
    model.half()
    assert "SLA on cpu" in handle.summary() and "restored" in handle.summary()


def test_fused_blocks_are_said_to_run_where_they_do(monkeypatch):
    pipe = tiny.wan_pipeline()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=2)) as handle:
        text = handle.summary()
        assert f"(from {modulation.LEAST_ELEMENTS} elements on, outside training and autocast) on cpu" in text
        pipe.transformer.half()
        assert "outside training and autocast): no backend takes it yet" in handle.summary()
        assert "not fused: takes torch.float32 and torch.bfloat16, got torch.float16" in handle.summary()
    # A model on a device without a kernel that may be picked, as on CUDA until its records are in.
    monkeypatch.setattr(modulation, "_devices", lambda: ("cuda",))
    with tk.patch(tiny.wan_pipeline(), sampler=tk.ParaTAA(window=2)) as handle:
        rows = [row for row in handle.replaced if modulation.FUSED in row.now]
    assert rows and {row.backend for row in rows} == {"none"}


def test_a_copy_of_the_pipeline_samples_in_parallel_too(one_thread):  # noqa: F811
    pipe = tiny.wan_pipeline()
    want = tiny.wan_call(pipe, steps=4)
    handle = tk.patch(pipe, sampler=tk.ParaTAA(window=4, tolerance=1e-6, ridge=1e-6))
    got = tiny.wan_call(pipe, steps=4)
    twin = copy.deepcopy(pipe)
    assert type(twin.scheduler).__name__ == type(pipe.scheduler).__name__
    theirs = twin._triskele_sampler
    assert theirs is not handle.sampler and theirs.denoiser is twin.transformer and not theirs.last
    before = handle.sampler.last
    assert torch.equal(tiny.wan_call(twin, steps=4), got)
    assert theirs.last[0].nfe > 4 and handle.sampler.last is before
    with torch.no_grad():
        twin.transformer.patch_embedding.weight.zero_()
    assert torch.equal(tiny.wan_call(pipe, steps=4), got)
    handle.restore()
    assert torch.equal(tiny.wan_call(pipe, steps=4), want)


def test_a_copy_of_the_scheduler_alone_is_a_plain_one():
    pipe = tiny.wan_pipeline()
    base = type(pipe.scheduler)
    with tk.patch(pipe, sampler=tk.ParaTAA(window=2)):
        pipe.scheduler.set_timesteps(3)
        for made in (copy.deepcopy(pipe.scheduler), copy.copy(pipe.scheduler)):
            assert type(made) is base and type(made.timesteps) is torch.Tensor
            assert made.timesteps.tolist() == pipe.scheduler.timesteps.tolist()


def test_a_pipeline_under_the_sampler_is_not_pickled():
    pipe = tiny.dit_pipeline()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=2)) as handle:
        for target in (pipe.scheduler, handle.sampler):
            with pytest.raises(TypeError, match="under ParaTAA cannot be pickled; restore"):
                pickle.dumps(target)
