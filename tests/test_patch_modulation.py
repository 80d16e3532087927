"""Fused norm, modulation and gate inside the blocks of a patched pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from patching import assert_restored, snapshot
from tiny import FAMILIES, dit_inputs, dit_model, flux_inputs, flux_model, wan_call, wan_inputs, wan_model, wan_pipeline

import triskele as tk
from triskele.diffusers import basic, modulation
from triskele.diffusers.adapters import adapter_for
from triskele.diffusers.adapters import flux as flux_adapter
from triskele.diffusers.adapters import wan as wan_adapter
from triskele.diffusers.undo import UndoLog

BLOCKS = {"wan": 2, "dit": 2, "pixart": 2, "flux": 3}
OPS = {"wan": 8, "dit": 8, "pixart": 8, "flux": 12}    # two norms and two gates a block; Flux: 8 a double, 2 a single


@pytest.fixture
def calls(monkeypatch):
    """Every size is fused, and the calls of the ops are counted."""
    seen = []

    def counting(name):
        op = getattr(modulation, name)

        def call(*args, **kwargs):
            seen.append(name)
            return op(*args, **kwargs)
        monkeypatch.setattr(modulation, name, call)
    for name in ("adaln_modulate", "gate_residual"):
        counting(name)
    monkeypatch.setattr(modulation, "LEAST_ELEMENTS", 0)
    return seen


def fuse(model):
    undo = UndoLog()
    return undo, modulation.apply(model, adapter_for(model), undo)


def run(model, inputs, grad=False):
    with torch.set_grad_enabled(grad):
        return model(**inputs, return_dict=False)[0]


def cast(inputs, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_compute_what_they_did(family, calls):
    make, inputs, *_ = FAMILIES[family]
    model, inputs = make(), inputs()
    want, before = run(model, inputs), snapshot(model)
    undo, replaced = fuse(model)
    got = run(model, inputs)
    assert len(calls) == OPS[family] and calls.count("adaln_modulate") == calls.count("gate_residual")
    assert len(replaced) == BLOCKS[family] and {r.answered().backend for r in replaced} == {"cpu"}
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    undo.rollback()
    assert_restored(model, before)
    assert torch.equal(run(model, inputs), want)


@pytest.mark.parametrize("family", ["wan", "dit", "pixart"])
def test_bfloat16_is_no_further_from_the_truth(family, calls):
    make, inputs, *_ = FAMILIES[family]
    model, inputs = make().to(torch.bfloat16), cast(inputs(), torch.bfloat16)
    exact = run(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    plain = run(model, inputs)
    fuse(model)
    got = run(model, inputs)
    assert calls and got.dtype == plain.dtype
    assert (got - exact).norm() <= 1.1 * (plain - exact).norm()


def test_small_inputs_training_autocast_and_other_dtypes_keep_the_blocks_own_forward(calls, monkeypatch):
    model, inputs = wan_model(), wan_inputs()
    want = run(model, inputs)
    with_grad = run(model, inputs, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast_automatically = run(model, inputs)
    fuse(model)
    got = run(model, inputs, grad=True)
    assert torch.equal(got, with_grad) and got.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model, inputs), cast_automatically)
    monkeypatch.setattr(modulation, "LEAST_ELEMENTS", 10**9)
    assert torch.equal(run(model, inputs), want)
    monkeypatch.setattr(modulation, "LEAST_ELEMENTS", 0)
    assert not calls
    double, wide = wan_model().double(), cast(inputs, torch.float64)
    exact = run(double, wide)
    fuse(double)
    assert torch.equal(run(double, wide), exact) and not calls
    run(model, inputs)
    assert len(calls) == OPS["wan"]


def test_a_linear_in_another_dtype(calls):
    residual, x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 8)
    got = modulation.gated(residual, x, gate)
    assert got.dtype == torch.float32 and torch.equal(got, residual + gate[:, None] * x) and not calls


def test_chunked_feed_forward_and_timesteps_by_token_keep_the_blocks_own_forward(calls):
    model, inputs = dit_model(), dit_inputs()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(2, 1)
    want = run(model, inputs)
    fuse(model)
    assert torch.equal(run(model, inputs), want) and not calls
    model = wan_model()
    block, x = model.blocks[0], torch.randn(1, 6, 24)
    rows, text = torch.randn(1, 6, 6, 24), torch.randn(1, 7, 24)
    with torch.no_grad():
        want = block(x, text, rows, None)
        fuse(model)
        assert torch.equal(block(x, text, rows, None), want) and not calls


def test_blocks_that_are_not_as_known_are_left_alone():
    model = wan_model()

    class Norm(torch.nn.LayerNorm):
        pass
    model.blocks[0].norm1 = Norm(24, elementwise_affine=False)
    model.blocks[1].forward = model.blocks[1].forward                # somebody's wrapper
    undo, replaced = fuse(model)
    assert not replaced and len(undo) == 0
    model = dit_model()
    for block in model.transformer_blocks:
        block.pos_embed = torch.nn.Identity()
    assert fuse(model)[1] == []
    unet = FAMILIES["unet"][0]()
    assert fuse(unet)[1] == []


def test_adapters_know_the_arguments_of_todays_blocks():
    """A diffusers whose block takes other arguments is not fused; this one must be."""
    for make, known in ((wan_model, wan_adapter.ADAPTER.fused_blocks), (dit_model, basic.FUSED_BLOCKS),
                        (flux_model, flux_adapter.ADAPTER.fused_blocks)):
        blocks = {type(b).__name__: b for b in make().modules() if type(b).__name__ in known}
        assert set(blocks) == set(known)
        for name, (fused, fits) in known.items():
            assert fits(blocks[name])
            assert modulation._arguments(type(blocks[name]).forward) == modulation._arguments(fused)


def test_a_wrapper_around_our_forward_outlives_the_patch(calls):
    model, inputs = wan_model(), wan_inputs()
    want = run(model, inputs)
    undo, _ = fuse(model)
    block = model.blocks[0]
    held = block.forward
    block.forward = lambda *args, **kwargs: held(*args, **kwargs)     # as accelerate's hooks do
    run(model, inputs)
    wrapper = block.forward
    undo.rollback()
    calls.clear()
    assert block.forward is wrapper and "forward" not in model.blocks[1].__dict__
    assert torch.equal(run(model, inputs), want) and not calls
    block.forward = held                                              # the hook is taken off later
    assert torch.equal(run(model, inputs), want) and not calls


def test_a_copy_of_the_model_runs_on_its_own_weights(calls):
    model, inputs = wan_model(), wan_inputs()
    fuse(model)
    want, twin = run(model, inputs), copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0].scale_shift_table.add_(1.0)
    assert torch.equal(run(twin, inputs), want) and not torch.equal(run(model, inputs), want)


def test_image_prompts_keep_fluxs_own_forward(calls):
    model, inputs = flux_model(layers=1, single_layers=0), flux_inputs()
    prompt = dict(joint_attention_kwargs={"ip_hidden_states": [torch.zeros(1, 1, 1, 32)]})
    want = run(model, inputs | prompt)
    fuse(model)
    assert torch.equal(run(model, inputs | prompt), want) and not calls


def test_compiles_without_a_graph_break(calls):
    model, inputs = wan_model(layers=1), wan_inputs()
    want = run(model, inputs)
    fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert (run(compiled, inputs) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("family", BLOCKS)
def test_the_sampler_arm_brings_it_and_takes_it_away(family, calls):
    *_, pipeline, call = FAMILIES[family]
    pipe = pipeline()
    want = call(pipe, steps=3)
    calls.clear()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=3, tolerance=1e-6, ridge=1e-6)) as handle:
        got = call(pipe, steps=3)
        assert len(calls) > OPS[family]
        text = handle.summary()
        assert modulation.FUSED in text and f"{BLOCKS[family] - (family == 'flux') * 2} x" in text
        assert handle.replaced[0].name == "scheduler"
    assert (got - want).abs().max() <= 1e-4 * max(1.0, float(want.abs().max()))
    calls.clear()
    assert torch.equal(call(pipe, steps=3), want) and not calls
    assert not any("forward" in m.__dict__ for m in pipe.transformer.modules())


def test_with_the_other_arms(calls):
    pipe = wan_pipeline()
    arms = dict(attention=tk.SLA(keep=1.0, linear="none", block_q=16, block_k=16), linear=tk.SVDQuant(rank=4))
    with tk.patch(pipe, **arms):
        want = wan_call(pipe, steps=3)
    assert not calls
    with tk.patch(pipe, **arms, sampler=tk.ParaTAA(window=3, tolerance=1e-6, ridge=1e-6)):
        got = wan_call(pipe, steps=3)
    assert calls and (got - want).abs().max() <= 2e-2 * max(1.0, float(want.abs().max()))
