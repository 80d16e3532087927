"""Flux patched with sparse attention: the real FluxPipeline on a tiny random model; text is always kept."""

from __future__ import annotations

import patching
import pytest
import tiny
import torch

import triskele as tk


def test_keep_all_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("flux")


def test_sparse_differs():
    patching.check_sparse_differs("flux")


def test_restore():
    patching.check_restore("flux", (patching.SPARSE_SLA, tk.VMoBA(top_k=1)))


def test_fullgraph():
    patching.check_fullgraph("flux")


def test_gradient_checkpointing():
    patching.check_checkpointing("flux")


def test_round_trip(tmp_path):
    patching.check_round_trip("flux", tmp_path)


def test_text_keys_are_kept_in_every_block(monkeypatch):
    from triskele.nn import SparseLinearAttention

    seen = []
    forward = SparseLinearAttention.forward

    def record(self, q, k, v, keep_keys=None, key_mask=None):
        seen.append((q.shape[2], keep_keys))
        return forward(self, q, k, v, keep_keys=keep_keys, key_mask=key_mask)

    monkeypatch.setattr(SparseLinearAttention, "forward", record)
    model = tiny.flux_model(layers=2, single_layers=3)
    with tk.patch(model, attention=patching.SPARSE_SLA):
        model(**tiny.flux_inputs(text=7))
        model(**tiny.flux_inputs(text=11))
    assert seen == [(103, [(0, 7)])] * 5 + [(107, [(0, 11)])] * 5


def test_the_output_depends_on_every_text_token():
    """With one block kept, a row would rarely see the text if it were not forced."""
    model, inputs = tiny.flux_model(layers=0, single_layers=1), tiny.flux_inputs(text=7)
    inputs["encoder_hidden_states"].requires_grad_()
    with tk.patch(model, attention=tk.SLA(keep=1, linear="none", block_q=8, block_k=8)):
        out = model(**inputs, return_dict=False)[0]
        for token in (0, out.shape[1] // 2, out.shape[1] - 1):
            (grad,) = torch.autograd.grad(out[0, token].sum(), inputs["encoder_hidden_states"], retain_graph=True)
            assert (grad[0].abs().amax(-1) > 0).all()


def test_fused_projections():
    model, inputs = tiny.flux_model(), tiny.flux_inputs()
    want = model(**inputs, return_dict=False)[0]
    model.fuse_qkv_projections()
    with tk.patch(model, attention=patching.DENSE_SLA):
        got = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_key_mask_through_joint_attention_kwargs():
    model, inputs = tiny.flux_model(), tiny.flux_inputs(batch=2)
    mask = torch.ones(2, 1, 1, 103, dtype=torch.bool)
    mask[0, ..., 4:7] = False
    kwargs = dict(joint_attention_kwargs={"attention_mask": mask}, return_dict=False)
    want = model(**inputs, **kwargs)[0]
    assert not torch.allclose(want, model(**inputs, return_dict=False)[0])
    with tk.patch(model, attention=patching.DENSE_SLA):
        torch.testing.assert_close(model(**inputs, **kwargs)[0], want, rtol=1e-4, atol=1e-4)
        full = mask.expand(2, 1, 103, 103)
        with pytest.raises(ValueError, match="one value a key"):
            model(**inputs, joint_attention_kwargs={"attention_mask": full})


def test_vmoba_with_every_chunk_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("flux", tk.VMoBA(top_k=10_000))


def test_vmoba_differs_and_checkpoints_agree():
    patching.check_sparse_differs("flux", tk.VMoBA(top_k=1))
    model, inputs = tiny.flux_model(), tiny.flux_inputs()
    grads = []
    with tk.patch(model, attention=tk.VMoBA(top_k=1)):
        for checkpoint in (False, True):
            model.gradient_checkpointing = checkpoint
            if checkpoint:
                model.enable_gradient_checkpointing()
            model.zero_grad()
            model.train()(**inputs, return_dict=False)[0].square().mean().backward()
            grads.append(model.x_embedder.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_vmoba_keeps_the_text_and_lets_it_see_all():
    """Against dense attention under the mask that the chunks stand for."""
    from triskele.nn.vmoba_joint import JointVMoBAAttention
    from triskele.ops import vmoba_select

    config = tk.VMoBA(top_k=2, chunks=(1, (4, 4), (1, 4, 4)))
    text, grid = 7, (1, 8, 12)
    q, k, v = torch.randn(3, 2, 2, text + 96, 16).unbind(0)
    core = JointVMoBAAttention(config, layer_index=1)
    partition = core.partition(grid)
    chosen = vmoba_select(q[:, :, text:], k[:, :, text:], chunk=partition, top_k=2)  # [B, C, H, S]
    chunk_of = torch.empty(96, dtype=torch.int64)
    for c, (start, stop) in enumerate(zip(partition.bounds[:-1], partition.bounds[1:])):
        chunk_of[partition.order[start:stop]] = c
    seen = torch.ones(2, 2, text + 96, text + 96, dtype=torch.bool)
    seen[:, :, text:, text:] = chosen.permute(0, 2, 3, 1)[..., chunk_of]
    assert not seen.all()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(core(q, k, v, grid, text=text), want, rtol=1e-4, atol=1e-5)


def test_reference_images_beside_the_image_are_an_error_under_vmoba():
    model, inputs = tiny.flux_model(), tiny.flux_inputs(height=8, width=12)
    inputs["img_ids"] = inputs["img_ids"].clone()
    inputs["img_ids"][48:] = inputs["img_ids"][:48]  # two pictures of half the size, as Kontext gives them
    with tk.patch(model, attention=tk.VMoBA()), pytest.raises(ValueError, match="token grid: expected 96 tokens"):
        model(**inputs)


def test_ip_adapter_is_refused_and_nothing_stays():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = tiny.flux_model()
    model.single_transformer_blocks[1].attn.set_processor(FluxIPAdapterAttnProcessor(32, 16))
    before = patching.snapshot(model)
    with pytest.raises(ValueError, match="has the processor FluxIPAdapterAttnProcessor"):
        tk.patch(model, attention=tk.SLA())
    patching.assert_restored(model, before)
