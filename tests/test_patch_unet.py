"""The Stable Diffusion UNet patched with sparse attention: the real StableDiffusionPipeline on a tiny random model."""

from __future__ import annotations

import patching
import pytest
import tiny
import torch

import triskele as tk
from triskele.diffusers.adapters.unet import UNetSparseProcessor
from triskele.diffusers.grid import TokenGrid
from triskele.diffusers.processor import SLA_CHILD, VMOBA_CHILD


def test_keep_all_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("unet")


def test_vmoba_with_every_chunk_is_the_dense_pipeline():
    patching.check_keep_all_is_dense("unet", tk.VMoBA(top_k=10_000))


@pytest.mark.parametrize("config", [patching.SPARSE_SLA, tk.VMoBA(top_k=1)], ids=["sla", "vmoba"])
def test_sparse_differs(config):
    patching.check_sparse_differs("unet", config)


def test_restore():
    patching.check_restore("unet", (patching.SPARSE_SLA, tk.VMoBA(top_k=1)))


def test_gradient_checkpointing():
    patching.check_checkpointing("unet")


def test_round_trip(tmp_path):
    patching.check_round_trip("unet", tmp_path)


def test_self_attention_in_the_order_of_the_forward_pass():
    model = tiny.unet_model()
    order = []
    for name, module in model.named_modules():
        if name.endswith("attn1"):
            module.register_forward_hook(lambda *_, n=name: order.append(n))
    with tk.patch(model, attention=patching.SPARSE_SLA) as handle:
        model(**tiny.unet_inputs())
        assert [row.name for row in handle.replaced] == order
        kinds = {name.rsplit(".", 2)[-2]: type(p) for name, p in model.attn_processors.items()}
    assert kinds["attn1"] is UNetSparseProcessor and kinds["attn2"].__name__ == "AttnProcessor2_0"


@pytest.mark.parametrize("latents, tokens, grid", [
    ((16, 24), 384, (1, 16, 24)), ((16, 24), 96, (1, 8, 12)), ((15, 9), 40, (1, 8, 5)), ((15, 9), 12, (1, 4, 3)),
    ((2, 64), 32, (1, 1, 32)),
])
def test_grid_of_a_level(latents, tokens, grid):
    shared = TokenGrid()
    shared.size = (1, *latents)
    assert UNetSparseProcessor(VMOBA_CHILD, grid=shared).size(tokens) == grid


def test_grid_that_is_no_halving_is_an_error():
    shared = TokenGrid()
    shared.size = (1, 16, 24)
    with pytest.raises(ValueError, match="expected a halving"):
        UNetSparseProcessor(VMOBA_CHILD, grid=shared).size(97)


def test_four_dimensional_inputs_group_norm_and_residual():
    """The parts of AttnProcessor2_0 that only the older attention blocks use."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    attn = tiny._stir(Attention(query_dim=8, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True,
                                rescale_output_factor=1.5, bias=True, qk_norm="rms_norm"))
    x = torch.randn(2, 8, 5, 6)
    want = AttnProcessor2_0()(attn, x)
    attn.add_module(SLA_CHILD, tk.nn.SparseLinearAttention(4, patching.DENSE_SLA))
    got = UNetSparseProcessor(SLA_CHILD)(attn, x)
    assert got.shape == x.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_cross_attention_blocks_are_no_sites():
    model = tiny.unet_model(only_cross_attention=(True, False))
    with tk.patch(model, attention=patching.SPARSE_SLA) as handle:
        assert all(row.name.startswith("mid_block") or row.name.startswith("up_blocks") for row in handle.replaced)
        model(**tiny.unet_inputs())


def test_a_unet_without_self_attention_is_refused():
    model = tiny.unet_model(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                            mid_block_type=None)
    with pytest.raises(ValueError, match="UNet cannot be patched: none of its blocks"):
        tk.patch(model, attention=tk.SLA())


def test_gligen_is_refused():
    with pytest.raises(ValueError, match="GLIGEN"):
        tk.patch(tiny.unet_model(attention_type="gated"), attention=tk.SLA())


def test_custom_processors_are_refused():
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    model = tiny.unet_model()
    name = next(n for n in model.attn_processors if n.endswith("attn1.processor")).removesuffix(".processor")
    model.get_submodule(name).set_processor(CustomDiffusionAttnProcessor2_0(train_kv=False, train_q_out=False))
    with pytest.raises(ValueError, match="CustomDiffusionAttnProcessor2_0; expected one of"):
        tk.patch(model, attention=tk.SLA())
