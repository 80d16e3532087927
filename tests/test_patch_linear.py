"""SVDQuant inside models: which linears it takes, what it refuses, and that restore() gives the same objects back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from patching import assert_restored, snapshot
from tiny import FAMILIES, dit_model, wan_call, wan_inputs, wan_model, wan_pipeline
from torch import nn

import triskele as tk
from triskele.diffusers import collect_activations, linear
from triskele.diffusers.adapters import adapter_for
from triskele.diffusers.undo import UndoLog
from triskele.nn import SVDQuantLinear

RANK4 = tk.SVDQuant(rank=4)


def quantized(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SVDQuantLinear)]


def relative(got, want) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_its_table_and_stays_close(family):
    model, inputs = FAMILIES[family][0](), FAMILIES[family][1]()
    before = snapshot(model)
    adapter = adapter_for(model)
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        with tk.patch(model, linear=tk.SVDQuant(rank=8)) as handle:
            names = quantized(model)
            assert names and all(adapter.is_linear_site(name) for name in names)
            left = [n for n, m in model.named_modules() if type(m) is nn.Linear]
            assert left and not any(adapter.is_linear_site(name) for name in left)
            got = model(**inputs, return_dict=False)[0]
            assert 1e-5 < relative(got, want) < 0.15
            assert [r.name for r in handle.replaced] == names
            with_gelu = [r for r in handle.replaced if r.now == "SVDQuantLinear with GELU"]
            assert all(r.was.startswith("Linear") and r.now.startswith("SVDQuantLinear") for r in handle.replaced)
            assert {r.backend for r in handle.replaced} == {"cpu"}
            assert f"{len(names) - len(with_gelu)} x Linear -> SVDQuantLinear on cpu" in handle.summary()
        assert torch.equal(model(**inputs, return_dict=False)[0], want)
    assert_restored(model, before)


def test_full_rank_is_the_model_itself():
    """With as many ranks as columns nothing is left for the 4 bits to lose."""
    model, inputs = wan_model(), wan_inputs()
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        tk.patch(model, linear=tk.SVDQuant(rank=24, activation="none", backend="reference"))
        assert relative(model(**inputs, return_dict=False)[0], want) < 1e-2      # factors are bfloat16


def test_include_and_exclude_are_name_endings():
    model = wan_model()
    with tk.patch(model, linear=tk.SVDQuant(rank=4, include=("ffn.net.2", "attn1.to_q"))):
        assert quantized(model) == ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "blocks.1.attn1.to_q",
                                    "blocks.1.ffn.net.2"]
    with tk.patch(model, linear=tk.SVDQuant(rank=4, exclude=("to_q", "blocks.1.ffn.net.2"))):
        names = quantized(model)
    assert not any(name.endswith("to_q") for name in names)
    assert "blocks.0.ffn.net.2" in names and "blocks.1.ffn.net.2" not in names


@pytest.mark.parametrize("config, match", [
    (tk.SVDQuant(include=("attn1.to_q", "attn9.to_q")), r"include: expected endings .* got \['attn9.to_q'\]"),
    (tk.SVDQuant(include=("proj_out",)), "include: expected"),          # outside of the blocks
    (tk.SVDQuant(exclude=("to_qq",)), r"exclude: expected .* got \['to_qq'\]"),
    (tk.SVDQuant(include=("attn1.to_q",), exclude=("to_q",)), "at least one linear"),
])
def test_a_pattern_without_a_match_is_refused(config, match):
    model = wan_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        tk.patch(model, linear=config)
    assert_restored(model, before)


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model = wan_model()
    with torch.no_grad():
        model.blocks[1].ffn.net[2].weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.2 \[24, 32\]: weight: expected finite values"):
        tk.patch(model, linear=RANK4)
    assert [e[0] for e in before] == [e[0] for e in snapshot(model)]
    assert not quantized(model)


def test_other_quantizers_and_lora_are_refused():
    model = wan_model()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="without a quantizer, got WanTransformer3DModel under 'bitsandbytes'"):
        tk.patch(model, linear=RANK4)

    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.weight = base, base.weight

        def forward(self, x):
            return self.base_layer(x)

    model = wan_model()
    model.blocks[0].attn1.to_q = Wrapped(model.blocks[0].attn1.to_q)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q is wrapped by Wrapped \(LoRA\)"):
        tk.patch(model, linear=RANK4)
    model = wan_model()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="without LoRA"):
        tk.patch(model, linear=RANK4)

    class Other(nn.Linear):
        pass

    model = wan_model()
    model.blocks[0].attn1.to_k = Other(24, 24)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_k: expected torch\.nn\.Linear, got .*Other"):
        tk.patch(model, linear=RANK4)
    model = wan_model()
    model.blocks[0].attn1.to_k.weight = nn.Parameter(torch.ones(24, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="plain floating tensor"):
        tk.patch(model, linear=RANK4)


def test_patching_what_is_patched_is_refused():
    model = wan_model()
    with tk.patch(model, linear=RANK4), pytest.raises(ValueError, match="restore"):
        tk.patch(model, linear=RANK4)
    undo = UndoLog()
    linear.apply(model, adapter_for(model), RANK4, undo)
    with pytest.raises(ValueError, match=r"expected torch\.nn\.Linear, got .*SVDQuantLinear"):
        linear.apply(model, adapter_for(model), RANK4, undo)
    undo.rollback()
    assert not quantized(model)


def test_meta_model_gets_empty_linears():
    from diffusers import WanTransformer3DModel

    real = wan_model()
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(dict(real.config)).eval()
    handle = tk.patch(model, linear=RANK4)
    assert len(quantized(model)) == 20
    assert all(t.is_meta for t in model.state_dict().values())
    assert {r.backend for r in handle.replaced} == {""}
    tk.patch(real, linear=RANK4)
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} \
        == {k: (v.shape, v.dtype) for k, v in real.state_dict().items()}
    model.load_state_dict(real.state_dict(), assign=True)
    model.rope = real.rope
    assert torch.equal(model(**wan_inputs(), return_dict=False)[0], real(**wan_inputs(), return_dict=False)[0])
    handle.restore()
    assert not quantized(model)


def test_memory_and_dtype():
    model = wan_model(layers=1, num_attention_heads=4, attention_head_dim=32, ffn_dim=256)
    blocks = model.blocks.state_dict().values()
    before = sum(t.numel() * 2 for t in blocks)
    model.to(torch.bfloat16)
    with tk.patch(model, linear=tk.SVDQuant(rank=8)):
        after = sum(t.numel() * t.element_size() for t in model.blocks.state_dict().values())
        assert after < 0.4 * before
        inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in wan_inputs().items()}
        assert model(**inputs, return_dict=False)[0].dtype == torch.bfloat16


def test_pipeline_is_patched_in_place():
    pipe = wan_pipeline()
    want = wan_call(pipe)
    with tk.patch(pipe, linear=tk.SVDQuant(rank=8)):
        assert 1e-5 < relative(wan_call(pipe), want) < 0.2
    assert torch.equal(wan_call(pipe), want)


# ---- activations -----------------------------------------------------------------------------------------------------

def test_collected_activations_are_the_inputs():
    model, inputs = dit_model(), FAMILIES["dit"][1]()
    names = linear.sites(model, adapter_for(model), tk.SVDQuant())
    seen = []
    hook = model.transformer_blocks[0].attn1.to_q.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    samples = collect_activations(model, names, lambda: model(**inputs), tokens=64)
    hook.remove()
    assert list(samples) == names
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    sample = samples["transformer_blocks.0.attn1.to_q"]
    assert sample.shape == (64, 24)
    found = (sample[:, None] == rows[None]).all(-1)
    assert found.any(1).all()                                             # every row is one that came by
    assert torch.equal(sample.abs().amax(), rows.abs().amax())            # and the largest is among them
    assert not model.transformer_blocks[0].attn1.to_q._forward_pre_hooks


def test_collection_is_bounded_and_uniform():
    layer = nn.Linear(1, 1)

    def run():
        for start in range(0, 4000, 500):
            layer(torch.arange(start, start + 500.0)[:, None])

    (sample,) = collect_activations(nn.Sequential(layer), ["0"], run, tokens=200).values()
    assert sample.shape == (200, 1)
    drawn = sample[:150, 0]
    assert len(drawn.unique()) == 150 and abs(float(drawn.mean()) - 2000) < 300
    assert sample[150:, 0].min() == 3950                                  # the quarter with the largest values
    (few,) = collect_activations(nn.Sequential(layer), ["0"], lambda: layer(torch.ones(2, 1)), tokens=200).values()
    assert len(few) == 4


def test_smoothing_on_activations_helps_with_outliers():
    model, inputs = dit_model(), FAMILIES["dit"][1]()
    with torch.no_grad():
        for block in model.transformer_blocks:                            # a few channels a hundred times the others
            block.ff.net[0].proj.weight[:4] *= 30
            block.ff.net[2].weight[:, :4] /= 30
        want = model(**inputs, return_dict=False)[0]
        adapter, config = adapter_for(model), tk.SVDQuant(rank=4, include=("ff.net.2",))
        samples = collect_activations(model, linear.sites(model, adapter, config), lambda: model(**inputs))
        errors = []
        for activations in (None, samples):
            undo = UndoLog()
            linear.apply(model, adapter, config, undo, activations=activations)
            errors.append(relative(model(**inputs, return_dict=False)[0], want))
            undo.rollback()
    assert errors[1] < 0.8 * errors[0]


def test_bad_activations():
    model = dit_model()
    adapter = adapter_for(model)
    with pytest.raises(ValueError, match="activations: expected names among the 12 linears"):
        linear.apply(model, adapter, RANK4, UndoLog(), activations={"nothing": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"to_q \[24, 24\]: activations: expected shape"):
        linear.apply(model, adapter, RANK4, UndoLog(),
                     activations={"transformer_blocks.0.attn1.to_q": torch.ones(1, 1)})
    with pytest.raises(ValueError, match="names: expected modules of DiTTransformer2DModel, got nothing"):
        collect_activations(model, ["nothing"], lambda: None)
    with pytest.raises(ValueError, match="no call of"):
        collect_activations(model, ["proj_out_1"], lambda: None)
    with pytest.raises(ValueError, match="tokens"):
        collect_activations(model, ["proj_out_1"], lambda: None, tokens=0)


def test_progress_bar_for_big_models(monkeypatch, capsys):
    model = wan_model()
    tk.patch(model, linear=RANK4).restore()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(linear, "PROGRESS_ELEMENTS", 100)
    tk.patch(model, linear=RANK4)
    assert "SVDQuant" in capsys.readouterr().err


def test_restore_follows_the_model_to_its_device():
    model = wan_model()
    handle = tk.patch(model, linear=RANK4)
    attn = model.blocks[0].attn1
    elsewhere = SimpleNamespace(is_meta=False, device=torch.device("meta"))  # in the place of a GPU
    attn.to_q._buffers["qweight"] = elsewhere
    attn.to_k.to("meta")  # as offloading does: its linear must keep its values
    handle.restore()
    assert attn.to_q.weight.is_meta and not attn.to_k.weight.is_meta and not attn.to_v.weight.is_meta
