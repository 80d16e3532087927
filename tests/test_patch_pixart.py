"""PixArt patched with sparse attention: the real PixArtAlphaPipeline on a tiny random model, and attention masks."""

from __future__ import annotations

import patching
import pytest
import tiny
import torch

import triskele as tk


def test_keep_all_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("pixart")


def test_vmoba_with_every_chunk_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("pixart", tk.VMoBA(top_k=10_000))


@pytest.mark.parametrize("config", [patching.SPARSE_SLA, tk.VMoBA(top_k=1)], ids=["sla", "vmoba"])
def test_sparse_differs(config):
    patching.check_sparse_differs("pixart", config)


def test_restore():
    patching.check_restore("pixart", (patching.SPARSE_SLA, tk.VMoBA(top_k=1)))


def test_gradient_checkpointing():
    patching.check_checkpointing("pixart")


def test_round_trip(tmp_path):
    patching.check_round_trip("pixart", tmp_path)


def test_cross_attention_is_left_alone():
    model = tiny.pixart_model()
    before = [block.attn2.processor for block in model.transformer_blocks]
    with tk.patch(model, attention=patching.SPARSE_SLA):
        assert all(block.attn2.processor is p for block, p in zip(model.transformer_blocks, before))


@pytest.mark.parametrize("bias", [False, True], ids=["mask", "bias"])
def test_padding_mask(bias):
    """keep = 1 under a padding mask is dense attention under it; the model turns the 0/1 mask into a bias itself."""
    model, inputs = tiny.pixart_model(), tiny.pixart_inputs()
    mask = torch.ones(2, 64)
    mask[0, 50:] = 0
    mask[1, :3] = 0
    if bias:
        mask = ((1 - mask) * -10000.0)[:, None]
    want = model(**inputs, attention_mask=mask, return_dict=False)[0]
    assert not torch.allclose(want, model(**inputs, return_dict=False)[0])
    with tk.patch(model, attention=patching.DENSE_SLA):
        got = model(**inputs, attention_mask=mask, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask, message", [
    (torch.zeros(2, 64, 64), r"expected \[2, 1, 64\], one value a key, got \[2, 64, 64\]"),
    (torch.full((2, 1, 64), -3.0), "a bias of 0"),
    (torch.zeros(2, 1, 32), r"expected \[2, 1, 64\]"),
], ids=["a row a query", "soft bias", "wrong length"])
def test_masks_that_cannot_be_expressed(mask, message):
    model, inputs = tiny.pixart_model(layers=1), tiny.pixart_inputs()
    with tk.patch(model, attention=patching.SPARSE_SLA), pytest.raises(ValueError, match=message):
        model(**inputs, attention_mask=mask)


def test_vmoba_takes_no_mask():
    model, inputs = tiny.pixart_model(layers=1), tiny.pixart_inputs()
    with tk.patch(model, attention=tk.VMoBA()), pytest.raises(ValueError, match="attention_mask: expected None"):
        model(**inputs, attention_mask=torch.ones(2, 64))
