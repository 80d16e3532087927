"""DiT, class-conditional images: every block has one attention, `attn1`, over the image tokens."""

from __future__ import annotations

from triskele.diffusers.basic import ORIGINALS, BasicSparseProcessor
from triskele.diffusers.interface import Adapter, AttentionSites, Site


def _find(model) -> list[Site]:
    return [Site(f"transformer_blocks.{i}.attn1", i) for i in range(len(model.transformer_blocks))]


def _grid(model, inputs) -> tuple[int, int, int]:
    height, width = inputs["hidden_states"].shape[-2:]
    return 1, height // model.config.patch_size, width // model.config.patch_size


ADAPTER = Adapter(
    family="DiT",
    model_classes=("DiTTransformer2DModel",),
    attention=AttentionSites(find=_find, processor=BasicSparseProcessor, originals=ORIGINALS, grid=_grid),
    linear_names=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_qkv", "attn1.to_out.0",
                  "ff.net.0.proj", "ff.net.2"),
    linear_within=("transformer_blocks",),
    batch_kwargs=("class_labels",),
    guidance_in_step=True,
    pipelines=("DiTPipeline",),
)
