"""DiT, class-conditional images: every block has one attention, `attn1`, over the image tokens."""

from __future__ import annotations

from triskele.diffusers.basic import FUSED_BLOCKS, ORIGINALS, BasicSparseProcessor, block_sites, patch_grid
from triskele.diffusers.interface import Adapter, AttentionSites

ADAPTER = Adapter(
    family="DiT",
    model_classes=("DiTTransformer2DModel",),
    attention=AttentionSites(find=block_sites, processor=BasicSparseProcessor, originals=ORIGINALS,
                             grid=patch_grid),
    linear_names=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_qkv", "attn1.to_out.0",
                  "ff.net.0.proj", "ff.net.2"),
    linear_within=("transformer_blocks",),
    batch_kwargs=("class_labels",),
    guidance_in_step=True,
    pipelines=("DiTPipeline",),
    fused_blocks=FUSED_BLOCKS,
)
