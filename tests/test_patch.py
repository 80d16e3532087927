"""patch, its transaction, its refusals, the registry of families and the table of what is supported."""

from __future__ import annotations

import subprocess
import sys

import diffusers
import patching
import pytest
import tiny
import torch

import triskele as tk
from triskele.diffusers import adapters, supported, supported_arms
from triskele.diffusers.undo import UndoLog


class Plain:
    def __init__(self):
        self.a = 1

    @property
    def double(self):
        return self.a * 2

    @double.setter
    def double(self, value):
        self.a = value / 2


def test_undo_of_attributes():
    obj, undo = Plain(), UndoLog()
    undo.setattr(obj, "a", 5)
    undo.setattr(obj, "a", 6)
    undo.setattr(obj, "b", 7)
    undo.setattr(obj, "double", 20)
    assert (obj.a, obj.b, len(undo)) == (10, 7, 4)
    undo.rollback()
    assert vars(obj) == {"a": 1}
    obj.a = 3
    undo.rollback()
    assert obj.a == 3


def test_undo_keeps_the_order_of_a_module():
    module, undo = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2)), UndoLog()
    module.weight = torch.nn.Parameter(torch.zeros(1))
    module.bias = torch.nn.Parameter(torch.zeros(1))
    module.register_buffer("first", torch.zeros(1))
    module.register_buffer("second", torch.zeros(1))
    before = [list(store.items()) for store in (module._modules, module._parameters, module._buffers)]
    attributes = list(vars(module))
    undo.set_module(module, "0", torch.nn.Identity())
    undo.set_module(module, "extra", torch.nn.Identity())
    undo.setattr(module, "weight", torch.nn.Identity())  # from a parameter to a child
    undo.setattr(module, "first", torch.ones(1))
    undo.setattr(module, "second", torch.nn.Parameter(torch.ones(1)))
    undo.setattr(module, "note", "new")
    assert list(module._modules) == ["0", "1", "2", "extra", "weight"]
    assert list(module._parameters) == ["bias", "second"] and list(module._buffers) == ["first"]
    undo.rollback()
    after = [list(store.items()) for store in (module._modules, module._parameters, module._buffers)]
    assert [[(k, id(v)) for k, v in store] for store in after] == [[(k, id(v)) for k, v in store] for store in before]
    assert list(vars(module)) == attributes


def test_undo_of_hooks_and_calls():
    module, calls, undo = torch.nn.Linear(2, 2), [], UndoLog()
    undo.register_hook(module.register_forward_pre_hook(lambda *_: None))
    undo.call(lambda: calls.append("first"))
    undo.call(lambda: calls.append("second"))
    undo.rollback()
    assert calls == ["second", "first"] and not module._forward_pre_hooks


def test_an_undo_that_fails_does_not_stop_the_others():
    undo, calls = UndoLog(), []
    undo.call(lambda: calls.append("reached"))
    undo.call(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        undo.rollback()
    assert calls == ["reached"] and len(undo) == 0


@pytest.mark.parametrize("kwargs, message", [
    ({}, "expected at least one of attention=, linear=, sampler="),
    ({"attention": tk.SVDQuant()}, r"attention: expected triskele.SLA\(...\) or triskele.VMoBA\(...\), got SVDQuant"),
    ({"attention": tk.SLA}, "attention: expected"),
    ({"linear": tk.SLA()}, "linear: expected triskele.SVDQuant"),
    ({"sampler": {"window": 4}}, "sampler: expected triskele.ParaTAA"),
    ({"attention": tk.SLA(), "linear": 4}, "linear: expected triskele.SVDQuant"),
])
def test_bad_arguments(kwargs, message):
    model = tiny.dit_model(layers=1)
    before = patching.snapshot(model)
    with pytest.raises(ValueError, match=message):
        tk.patch(model, **kwargs)
    patching.assert_restored(model, before)


@pytest.mark.parametrize("target", ["a name", None, {"transformer": 1}, diffusers.DDIMScheduler()])
def test_targets_that_hold_no_model(target):
    with pytest.raises(ValueError, match="target: expected a diffusers pipeline with one of"):
        tk.patch(target, attention=tk.SLA())


def test_sampler_needs_a_pipeline():
    with pytest.raises(ValueError, match="target with sampler: expected a pipeline"):
        tk.patch(tiny.dit_model(layers=1), sampler=tk.ParaTAA())


def test_unsupported_models_are_named_with_the_reason_and_the_list():
    sd3 = diffusers.SD3Transformer2DModel(sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2,
                                          caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8)
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel is not supported \(no adapter yet.*WanTransformer3DM"):
        tk.patch(sd3, attention=tk.SLA())
    with pytest.raises(ValueError, match=r"Linear is not supported; expected one of DiTTransformer2DModel"):
        tk.patch(torch.nn.Linear(2, 2), linear=tk.SVDQuant())


def test_patching_twice_is_refused_until_restored():
    pipe = tiny.dit_pipeline(layers=1)
    handle = tk.patch(pipe, attention=tk.SLA(keep=0.5))
    for target in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match=r"DiTTransformer2DModel under the live patch SLA\(keep=0.5.*restore\(\)"):
            tk.patch(target, attention=tk.VMoBA())
    assert handle.live
    handle.restore()
    tk.patch(pipe.transformer, attention=tk.VMoBA()).restore()


def test_the_same_model_in_another_pipeline_is_refused_too():
    pipe = tiny.dit_pipeline(layers=1)
    handle = tk.patch(pipe.transformer, attention=tk.SLA())
    with pytest.raises(ValueError, match="under the live patch"):
        tk.patch(pipe, sampler=tk.ParaTAA())
    handle.restore()
    handle = tk.patch(pipe, sampler=tk.ParaTAA())
    with pytest.raises(ValueError, match="DiTTransformer2DModel under the live patch ParaTAA"):
        tk.patch(pipe, attention=tk.SLA())
    handle.restore()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_an_exception_half_way_leaves_the_pipeline_as_it_was(monkeypatch, error):
    from triskele.diffusers import attention, quantizer

    pipe = tiny.wan_pipeline(layers=3)
    before = patching.snapshot(pipe)
    core, made = attention._core, []

    def third_fails(attn, config, layer, joint):
        if len(made) == 2:
            raise error("stop")
        made.append(layer)
        return core(attn, config, layer, joint)

    with monkeypatch.context() as patched:
        patched.setattr(attention, "_core", third_fails)
        with pytest.raises(error, match="stop"):
            tk.patch(pipe, attention=tk.VMoBA())
    assert len(made) == 2
    patching.assert_restored(pipe, before)

    def fail(*_args, **_kwargs):
        raise error("late")

    monkeypatch.setattr(quantizer, "attach_config", fail)  # after the whole arm
    with pytest.raises(error, match="late"):
        tk.patch(pipe, attention=tk.SLA())
    patching.assert_restored(pipe, before)
    monkeypatch.undo()
    tk.patch(pipe, attention=tk.SLA()).restore()


def test_a_refused_sampler_takes_the_other_arms_back():
    pipe = tiny.wan_pipeline(layers=1)
    pipe.register_to_config(expand_timesteps=True)
    before = patching.snapshot(pipe)
    with pytest.raises(ValueError, match="every token its own timestep"):
        tk.patch(pipe, attention=tk.SLA(), linear=tk.SVDQuant(rank=2), sampler=tk.ParaTAA())
    patching.assert_restored(pipe, before)


def test_context_manager_restores_and_lets_the_exception_through():
    model = tiny.dit_model(layers=1)
    before = patching.snapshot(model)
    with pytest.raises(KeyError, match="inside"), tk.patch(model, attention=tk.SLA()) as handle:
        assert handle.live
        raise KeyError("inside")
    assert not handle.live
    patching.assert_restored(model, before)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_all_arms_and_back(family):
    """Attention, linears and sampler together run through the pipeline's own call, and leave no trace."""
    *_, pipeline, call = tiny.FAMILIES[family]
    pipe = pipeline()
    plain = call(pipe, steps=4)
    before = patching.snapshot(pipe)
    handle = tk.patch(pipe, attention=tk.SLA(keep=0.5, block_q=16, block_k=16), linear=tk.SVDQuant(rank=4),
                      sampler=tk.ParaTAA(window=2))
    out = call(pipe, steps=4)
    assert out.shape == plain.shape and torch.isfinite(out).all() and not torch.equal(out, plain)
    assert {row.arm for row in handle.replaced} == {"attention", "linear", "sampler"}
    assert handle.sampler is not None
    handle.restore()
    patching.assert_restored(pipe, before, volatile=patching.CALL_TRACES)
    assert torch.equal(call(pipe, steps=4), plain)


def test_patch_draws_no_random_numbers():
    model, state = tiny.dit_model(), torch.get_rng_state()
    with tk.patch(model, attention=tk.SLA()):
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_meta_device(family):
    """A model without storage can be patched; its new parameters are on meta too, of the model's dtype."""
    whole = tiny.FAMILIES[family][0]()
    with torch.device("meta"):
        model = type(whole).from_config(whole.config).to(torch.bfloat16)
    before = list(model.state_dict())
    handle = tk.patch(model, attention=tk.SLA())
    new = {name: p for name, p in model.named_parameters() if "triskele_sla" in name}
    assert new and all(p.is_meta and p.dtype == torch.bfloat16 for p in new.values())
    assert all(row.backend == "" for row in handle.replaced)
    handle.restore()
    assert list(model.state_dict()) == before


def test_config_carries_the_patch_while_it_lives():
    model = tiny.dit_model()
    config = model.config
    with tk.patch(model, attention=tk.SLA(keep=0.25)):
        held = model.config["quantization_config"]
        assert held.to_dict()["attention"]["keep"] == 0.25
    assert model.config is config and "quantization_config" not in config


def test_a_loaded_patch_takes_the_other_arms(tmp_path):
    """A checkpoint saved under SLA comes back sparse; linears and sampler can be added and taken off again."""
    pipe = tiny.dit_pipeline()
    with tk.patch(pipe, attention=patching.SPARSE_SLA):
        want = tiny.dit_call(pipe)
        pipe.save_pretrained(tmp_path)
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.dit_call(pipe), want)
    before = patching.snapshot(pipe)
    with pytest.raises(ValueError, match="is sparse already"):
        tk.patch(pipe, attention=tk.SLA())
    with tk.patch(pipe, linear=tk.SVDQuant(rank=4), sampler=tk.ParaTAA(window=2)):
        assert pipe.transformer.config["quantization_config"].attention == patching.SPARSE_SLA
        tiny.dit_call(pipe)
    patching.assert_restored(pipe, before, volatile=patching.CALL_TRACES)
    assert torch.equal(tiny.dit_call(pipe), want)


@pytest.mark.parametrize("imports", [
    "import triskele; from diffusers import DiTTransformer2DModel",
    "from diffusers import DiTTransformer2DModel; import triskele",
], ids=["triskele first", "diffusers first"])
def test_importing_triskele_is_enough_to_load(tmp_path, imports):
    model = tiny.dit_model(layers=1)
    with tk.patch(model, attention=patching.SPARSE_SLA):
        model.save_pretrained(tmp_path)
    code = f"""
import sys
{imports}
before = "triskele.diffusers" in sys.modules
model = DiTTransformer2DModel.from_pretrained({str(tmp_path)!r})
print(before, type(model.transformer_blocks[0].attn1.processor).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "BasicSparseProcessor"], done.stderr


def test_summary_says_what_runs_where_and_why():
    pipe = tiny.dit_pipeline(layers=3)
    handle = tk.patch(pipe, attention=tk.SLA(keep=0.5, backend="reference"))
    text = str(handle.summary())
    assert "3 x AttnProcessor2_0 -> SLA on reference" in text and "SLA(keep=0.5" in text
    assert "transformer_blocks.0.attn1 ... transformer_blocks.2.attn1" in text
    assert "not cpu: backend='reference' was asked for" in text
    assert repr(handle.summary()) == text
    assert "live" in repr(handle) and "DiTPipeline" in repr(handle)
    handle.restore()
    assert "restored" in repr(handle)


def test_summary_of_a_dtype_without_a_kernel():
    """float64 on a CPU: the summary says that nothing runs it and why; the reference does, asked for by name."""
    model = tiny.dit_model(layers=1).to(torch.float64)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.dit_inputs().items()}
    with tk.patch(model, attention=tk.SLA()) as handle:
        assert "no backend takes it yet" in handle.summary()
        assert any("takes float32 and bfloat16" in reason for reason in handle.replaced[0].reasons)
        with pytest.raises(NotImplementedError, match="no backend takes these inputs"):
            model(**inputs)
    with tk.patch(model, attention=tk.SLA(keep=1.0, backend="reference")):
        got = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(got, model(**inputs, return_dict=False)[0])


def test_enabled_cache_is_refused():
    model = tiny.wan_model()
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="a cache is enabled on it"):
        tk.patch(model, attention=tk.SLA())
    model.disable_cache()
    tk.patch(model, attention=tk.SLA()).restore()


@pytest.mark.parametrize("kind", ["sequential CPU", "group"])
def test_offload_by_layers_comes_after_the_patch(kind):
    import accelerate

    model = tiny.wan_model(layers=1)
    if kind == "group":
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for arm in ({"attention": tk.SLA()}, {"linear": tk.SVDQuant(rank=2)}):
        with pytest.raises(ValueError, match=f"under {kind} offload; patch first"):
            tk.patch(model, **arm)


def test_a_compiled_model_is_patched_inside():
    model, inputs = tiny.dit_model(layers=1), tiny.dit_inputs()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        want = compiled(**inputs, return_dict=False)[0]
        with tk.patch(compiled, attention=patching.SPARSE_SLA):
            assert hasattr(model.transformer_blocks[0].attn1, "triskele_sla")
            sparse = compiled(**inputs, return_dict=False)[0]
        assert (sparse - want).abs().max() > 1e-4
        torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], want)


def test_a_subclass_of_a_model_is_its_family():
    class Mine(diffusers.DiTTransformer2DModel):
        pass

    assert adapters.adapter_for(Mine(**{**tiny.dit_model().config, "num_layers": 1})).family == "DiT"


def test_supported_table():
    rows = {row.family: row for row in supported() if row.family != "-"}
    assert set(rows) == {"Wan", "DiT", "PixArt", "Flux", "UNet"}
    assert all((row.attention, row.linear, row.sampler) == ("yes",) * 3 for row in rows.values())
    refused = {row.classes[0]: row.attention for row in supported() if row.family == "-"}
    assert refused["SD3Transformer2DModel"].startswith("refused: no adapter yet")
    for row in supported():
        assert all(hasattr(diffusers, name) for name in row.classes), row
    assert "WanTransformer3DModel" in str(supported())


def test_supported_arms_of_a_target():
    assert supported_arms(tiny.dit_pipeline(layers=1)) == {"attention": None, "linear": None, "sampler": None}
    bare = supported_arms(tiny.dit_model(layers=1))
    assert bare["attention"] is None and "no denoising loop" in bare["sampler"]
    assert set(supported_arms("nothing").values()) == {supported_arms("nothing")["linear"]}
    assert "expected a diffusers pipeline" in supported_arms("nothing")["linear"]


TOY = '''
from triskele.diffusers.basic import ORIGINALS, BasicSparseProcessor
from triskele.diffusers.interface import Adapter, AttentionSites, Site

ADAPTER = Adapter(
    family="Toy", model_classes=("Toy",), linear_names=(), linear_within=(),
    attention=AttentionSites(find=lambda model: [Site("attn", 0)], processor=BasicSparseProcessor,
                             originals=ORIGINALS, grid=lambda model, inputs: (1, 1, 1)),
)
'''


def test_adding_a_family_touches_one_file(tmp_path, monkeypatch):
    from diffusers.models.attention_processor import Attention

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = tiny._stir(Attention(query_dim=8, heads=2, dim_head=4))

    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])
    adapters.adapters.cache_clear()
    try:
        assert "Toy" in {row.family for row in supported()}
        report = []
        undo = UndoLog()
        toy, x = Toy(), torch.randn(1, 40, 8)
        want = toy.attn(x)
        from triskele.diffusers import attention

        report = attention.apply(toy, adapters.adapter_for(toy), patching.DENSE_SLA, undo)
        assert [row.name for row in report] == ["attn"]
        torch.testing.assert_close(toy.attn(x), want, rtol=1e-5, atol=1e-5)
        undo.rollback()
    finally:
        adapters.adapters.cache_clear()
