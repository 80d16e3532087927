"""PixArt alpha and sigma: `attn1` over the image tokens, `attn2` on the text."""

from __future__ import annotations

from triskele.diffusers.basic import FUSED_BLOCKS, ORIGINALS, BasicSparseProcessor, block_sites, patch_grid
from triskele.diffusers.interface import Adapter, AttentionSites

ADAPTER = Adapter(
    family="PixArt",
    model_classes=("PixArtTransformer2DModel",),
    attention=AttentionSites(find=block_sites, processor=BasicSparseProcessor, originals=ORIGINALS,
                             grid=patch_grid),
    linear_names=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_qkv", "attn1.to_out.0",
                  "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_kv", "attn2.to_out.0",
                  "ff.net.0.proj", "ff.net.2"),
    linear_within=("transformer_blocks",),
    batch_kwargs=("encoder_hidden_states", "encoder_attention_mask", "attention_mask", "added_cond_kwargs"),
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    fused_blocks=FUSED_BLOCKS,
)
