"""The UNet of Stable Diffusion 1, 2 and XL: `attn1` of every transformer block, at several resolutions."""

from __future__ import annotations

from triskele.diffusers.basic import ORIGINALS, BasicSparseProcessor
from triskele.diffusers.interface import Adapter, AttentionSites, Site


class UNetSparseProcessor(BasicSparseProcessor):
    def size(self, tokens: int) -> tuple[int, int, int]:
        """The model's hook sees the latents; a level's grid is theirs, halved and rounded up as its convolutions do."""
        if self.grid.size is not None:
            _, height, width = self.grid.size
            while height * width > tokens and (height, width) != (1, 1):
                height, width = (height + 1) // 2, (width + 1) // 2
            if height * width == tokens:
                return 1, height, width
        raise ValueError(f"token grid: expected a halving of the latents' {self.grid.size} with {tokens} tokens")


def _attn1(model) -> list[tuple[str, object]]:
    """Self-attentions in the order of the forward pass: down, middle, up."""
    found = []
    for part in ("down_blocks", "mid_block", "up_blocks"):
        child = getattr(model, part)
        if child is not None:
            found += [(f"{part}.{name}", block) for name, block in child.named_modules()
                      if type(block).__name__ == "BasicTransformerBlock"]
    return [(f"{name}.attn1", block) for name, block in found if not block.only_cross_attention]


def _find(model) -> list[Site]:
    return [Site(name, layer) for layer, (name, _) in enumerate(_attn1(model))]


def _refuse(model) -> str | None:
    if not _attn1(model):
        return "none of its blocks is a BasicTransformerBlock with self-attention"
    if getattr(model.config, "attention_type", "default") != "default":
        return "GLIGEN adds an attention over visual and object tokens together"
    return None


def _grid(model, inputs) -> tuple[int, int, int]:
    height, width = inputs["sample"].shape[-2:]
    return 1, height, width


ADAPTER = Adapter(
    family="UNet",
    model_classes=("UNet2DConditionModel",),
    attention=AttentionSites(find=_find, processor=UNetSparseProcessor, originals=ORIGINALS, grid=_grid,
                             refuse=_refuse),
    linear_names=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_qkv", "attn1.to_out.0",
                  "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_kv", "attn2.to_out.0",
                  "ff.net.0.proj", "ff.net.2"),
    linear_within=("down_blocks", "mid_block", "up_blocks"),
    latent_kwarg="sample",
    batch_kwargs=("encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask",
                  "added_cond_kwargs"),
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
)
