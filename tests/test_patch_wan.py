"""Wan patched with sparse attention: the real WanPipeline on a tiny random model."""

from __future__ import annotations

import copy

import patching
import pytest
import tiny
import torch

import triskele as tk
from triskele.diffusers.adapters.wan import WanSparseProcessor

ALL_CHUNKS = tk.VMoBA(top_k=10_000)


def test_keep_all_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("wan")


def test_untrained_projection_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("wan", tk.SLA(keep=1.0, block_q=16, block_k=16))


def test_vmoba_with_every_chunk_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("wan", ALL_CHUNKS)


@pytest.mark.parametrize("config", [patching.SPARSE_SLA, tk.VMoBA(top_k=1)], ids=["sla", "vmoba"])
def test_sparse_differs(config):
    patching.check_sparse_differs("wan", config)


def test_restore():
    patching.check_restore("wan", (patching.SPARSE_SLA, tk.VMoBA(top_k=1)))


@pytest.mark.parametrize("config", [patching.SPARSE_SLA, tk.VMoBA(top_k=1)], ids=["sla", "vmoba"])
def test_fullgraph(config):
    patching.check_fullgraph("wan", config)


def test_gradient_checkpointing():
    patching.check_checkpointing("wan")


def test_round_trip(tmp_path):
    patching.check_round_trip("wan", tmp_path)


def test_only_self_attention_is_replaced():
    model = tiny.wan_model(image_dim=20, added_kv_proj_dim=24)
    with tk.patch(model, attention=patching.SPARSE_SLA):
        for block in model.blocks:
            assert isinstance(block.attn1.processor, WanSparseProcessor)
            assert type(block.attn2.processor).__name__ == "WanAttnProcessor"
            assert not hasattr(block.attn2, "triskele_sla")


def test_fused_projections():
    model, inputs = tiny.wan_model(), tiny.wan_inputs()
    want = model(**inputs, return_dict=False)[0]
    model.fuse_qkv_projections()
    with torch.no_grad():
        model.blocks[0].attn1.to_q.weight.zero_()  # the fused copy is the one in use
    with tk.patch(model, attention=patching.DENSE_SLA):
        got = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_skip_layers_stay_dense():
    model = tiny.wan_model(layers=4)
    handle = tk.patch(model, attention=tk.SLA(keep=0.5, skip_layers=(1, 2)))
    names = [type(block.attn1.processor).__name__ for block in model.blocks]
    assert names == ["WanAttnProcessor", "WanSparseProcessor", "WanAttnProcessor", "WanAttnProcessor"]
    assert [name for name in model.state_dict() if "triskele" in name and "weight" in name] \
        == ["blocks.1.attn1.triskele_sla.proj.weight"]
    assert "left dense (skip_layers)" in handle.summary()


def test_vmoba_sees_the_grid_and_the_dense_steps(monkeypatch):
    from triskele.nn import VMoBAAttention

    seen = []
    forward = VMoBAAttention.forward

    def record(self, q, k, v, grid, dense=False):
        seen.append((self.layer_index, tuple(grid), dense))
        return forward(self, q, k, v, grid, dense=dense)

    monkeypatch.setattr(VMoBAAttention, "forward", record)
    pipe = tiny.wan_pipeline(layers=3)
    with tk.patch(pipe, attention=tk.VMoBA(top_k=1, dense_layers=1, dense_steps=0.3)):
        tiny.wan_call(pipe, steps=5, guidance_scale=1.0)
    assert {entry[1] for entry in seen} == {(3, 4, 6)}
    steps = [[entry[2] for entry in seen if entry[0] == layer] for layer in (0, 1, 2)]
    assert steps == [[], [True, True, False, False, False], [True, True, False, False, False]]


def test_dense_steps_of_a_bare_model_are_a_share_of_the_timesteps(monkeypatch):
    from triskele.nn import VMoBAAttention

    seen = []
    monkeypatch.setattr(VMoBAAttention, "forward", lambda self, q, k, v, grid, dense=False: seen.append(dense) or v)
    model, inputs = tiny.wan_model(layers=1), tiny.wan_inputs()
    with tk.patch(model, attention=tk.VMoBA(dense_steps=0.25)):
        for timestep in (1000.0, 751.0, 749.0, 10.0):
            model(**inputs | {"timestep": torch.tensor([timestep])})
    assert seen == [True, True, False, False]


def test_a_block_called_by_itself_has_no_grid():
    model = tiny.wan_model(layers=1)
    with tk.patch(model, attention=tk.VMoBA()), pytest.raises(ValueError, match="token grid: expected 12 tokens"):
        model.blocks[0].attn1(torch.randn(1, 12, 24))


def test_layers_of_the_module_are_called_as_before():
    """Hooks on the projections (LoRA works through the layers themselves) still run."""
    model, calls = tiny.wan_model(layers=1), []
    for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
        getattr(model.blocks[0].attn1, name).register_forward_hook(lambda *_, n=name: calls.append(n))
    model.blocks[0].attn1.to_out[0].register_forward_hook(lambda *_: calls.append("to_out.0"))
    with tk.patch(model, attention=patching.SPARSE_SLA):
        model(**tiny.wan_inputs())
    assert sorted(calls) == ["norm_k", "norm_q", "to_k", "to_out.0", "to_q", "to_v"]


def test_deepcopy_keeps_hook_and_processors_together():
    model, inputs = tiny.wan_model(), tiny.wan_inputs()
    tk.patch(model, attention=tk.VMoBA(top_k=1))
    twin = copy.deepcopy(model)
    want = model(**inputs, return_dict=False)[0]
    model(**tiny.wan_inputs(frames=1))  # leaves its own grid behind, not the twin's
    assert torch.equal(twin(**inputs, return_dict=False)[0], want)
    assert twin.blocks[0].attn1.processor.grid is not model.blocks[0].attn1.processor.grid


def test_both_models_of_a_pipeline_with_two():
    pipe = tiny.wan_pipeline()
    pipe.transformer_2 = tiny.wan_model(seed=1)
    with tk.patch(pipe, attention=patching.SPARSE_SLA) as handle:
        assert isinstance(pipe.transformer_2.blocks[0].attn1.processor, WanSparseProcessor)
        assert len(handle.replaced) == 4
    assert type(pipe.transformer_2.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_sparse_attention_in_bfloat16():
    model, inputs = tiny.wan_model().to(torch.bfloat16), tiny.wan_inputs()
    inputs = {name: value.to(torch.bfloat16) for name, value in inputs.items()}
    want = model(**inputs, return_dict=False)[0]
    with tk.patch(model, attention=tk.SLA(keep=1.0, block_q=16, block_k=16)):
        assert model.blocks[0].attn1.triskele_sla.proj.weight.dtype == torch.bfloat16
        got = model(**inputs, return_dict=False)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_context_parallelism_is_refused():
    model = tiny.wan_model()
    model.blocks[1].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 runs under context parallelism"):
        tk.patch(model, attention=tk.SLA())
    model.blocks[1].attn1.processor._parallel_config = None
    with tk.patch(model, attention=patching.SPARSE_SLA):
        model.blocks[1].attn1.processor._parallel_config = object()
        with pytest.raises(ValueError, match="context parallelism: expected none"):
            model(**tiny.wan_inputs())


def test_sequential_cpu_offload_fetches_the_projection():
    """Offload hooks sit on the leaves, the projection among them, and leave meta tensors behind."""
    import accelerate

    model, inputs = tiny.wan_model(layers=1), tiny.wan_inputs()
    tk.patch(model, attention=patching.SPARSE_SLA)
    with torch.no_grad():
        model.blocks[0].attn1.triskele_sla.proj.weight.normal_()
        want = model(**inputs, return_dict=False)[0]
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.blocks[0].attn1.triskele_sla.proj.weight.is_meta
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], want)


def test_fullgraph_over_several_lengths_compiles_once_more_at_most():
    from torch._dynamo.utils import counters

    model = tiny.wan_model(layers=1)
    torch._dynamo.reset()
    counters.clear()
    with tk.patch(model, attention=patching.SPARSE_SLA), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for frames in (2, 3, 4, 7):
            inputs = tiny.wan_inputs(frames=frames)
            torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], model(**inputs, return_dict=False)[0],
                                       rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2


def test_layerwise_casting_computes_in_the_wide_dtype():
    model, inputs = tiny.wan_model(), tiny.wan_inputs()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    want = model(**inputs, return_dict=False)[0]
    with tk.patch(model, attention=tk.SLA(keep=1.0, block_q=16, block_k=16)):
        assert model.blocks[0].attn1.triskele_sla.proj.weight.dtype == torch.float32
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], want, rtol=1e-3, atol=1e-3)


def test_repeated_blocks_compile_by_themselves():
    model, inputs = tiny.wan_model(), tiny.wan_inputs()
    with tk.patch(model, attention=tk.VMoBA(top_k=1)), torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)


def test_sparse_attention_follows_autocast():
    """Norms answer in float32 under autocast; torch's own attention is cast back, and so is this one."""
    model, seen = tiny.wan_model(), []
    with tk.patch(model, attention=tk.SLA(keep=1.0)):
        for block in model.blocks:
            block.attn1.triskele_sla.register_forward_pre_hook(lambda _, args: seen.extend(x.dtype for x in args[:3]))
        with torch.autocast("cpu", torch.bfloat16):
            model(**tiny.wan_inputs())
    assert seen == [torch.bfloat16] * 6
