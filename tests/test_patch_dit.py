"""DiT patched with sparse attention: the real DiTPipeline on a tiny random model."""

from __future__ import annotations

import patching
import pytest
import tiny
import torch

import triskele as tk


def test_keep_all_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("dit")


def test_untrained_alpha_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("dit", tk.SLA(keep=1.0, linear="alpha", block_q=16, block_k=16))


def test_vmoba_with_every_chunk_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("dit", tk.VMoBA(top_k=10_000))


@pytest.mark.parametrize("config", [patching.SPARSE_SLA, tk.VMoBA(top_k=1)], ids=["sla", "vmoba"])
def test_sparse_differs(config):
    patching.check_sparse_differs("dit", config)


def test_restore():
    patching.check_restore("dit", (patching.SPARSE_SLA, tk.VMoBA(top_k=1)))


@pytest.mark.parametrize("config", [patching.SPARSE_SLA, tk.VMoBA(top_k=1)], ids=["sla", "vmoba"])
def test_fullgraph(config):
    patching.check_fullgraph("dit", config)


def test_gradient_checkpointing():
    patching.check_checkpointing("dit")


@pytest.mark.parametrize("config", [
    patching.SPARSE_SLA, tk.SLA(keep=3, linear="alpha", block_q=16, block_k=16, skip_layers=(1, 0)),
    tk.VMoBA(top_k=(1, 2, 2), chunks=(1, (2, 4), (1, 4, 4))),
], ids=["projection", "alpha", "vmoba"])
def test_round_trip(tmp_path, config):
    patching.check_round_trip("dit", tmp_path, config)


def test_the_grid_follows_the_latents(monkeypatch):
    from triskele.nn import VMoBAAttention

    seen = []
    monkeypatch.setattr(VMoBAAttention, "forward",
                        lambda self, q, k, v, grid, dense=False: seen.append(tuple(grid)) or v)
    model = tiny.dit_model(layers=1)
    with tk.patch(model, attention=tk.VMoBA()):
        model(**tiny.dit_inputs())
        inputs = tiny.dit_inputs()
        model(inputs["hidden_states"][..., :8, :8], **{k: v for k, v in inputs.items() if k != "hidden_states"})
    assert seen == [(1, 8, 8), (1, 4, 4)]


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor", "FusedAttnProcessor2_0"])
def test_other_exact_processors_are_replaced_and_put_back(name):
    from diffusers.models import attention_processor

    model, inputs = tiny.dit_model(), tiny.dit_inputs()
    want = model(**inputs, return_dict=False)[0]
    cls = getattr(attention_processor, name)
    for block in model.transformer_blocks:
        if name.startswith("Fused"):
            block.attn1.fuse_projections()
        block.attn1.set_processor(cls(1) if name.startswith("Sliced") else cls())
    with tk.patch(model, attention=patching.DENSE_SLA):
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)
    assert type(model.transformer_blocks[0].attn1.processor) is cls


def test_head_dim_over_256_is_refused():
    model = tiny.dit_model(layers=1, num_attention_heads=1, attention_head_dim=264)
    with pytest.raises(ValueError, match="head_dim 264; expected 1 to 256"):
        tk.patch(model, attention=tk.SLA())
    assert "_triskele_patch" not in vars(model)
