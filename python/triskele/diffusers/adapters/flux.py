"""Flux.1: joint attention, text tokens first. Double blocks hand the text over apart, single blocks joined already."""

from __future__ import annotations

import torch

from triskele.diffusers.gelu import linear_then_gelu
from triskele.diffusers.interface import Adapter, AttentionSites, Site
from triskele.diffusers.modulation import gated, modulate, plain_norms
from triskele.diffusers.processor import SparseProcessor, key_mask_of


class FluxSparseProcessor(SparseProcessor):
    """Follows FluxAttnProcessor; the text keys are kept in every row."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.embeddings import apply_rotary_emb

        double = encoder_hidden_states is not None
        text = encoder_hidden_states.shape[1] if double else self.text_tokens()
        q, k, v = self._project(attn, hidden_states, "to_qkv", ("to_q", "to_k", "to_v"))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if double:
            text_q, text_k, text_v = self._project(attn, encoder_hidden_states, "to_added_qkv",
                                                   ("add_q_proj", "add_k_proj", "add_v_proj"))
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        if image_rotary_emb is not None:
            q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
            k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
        key_mask = key_mask_of(attention_mask, q.shape[0], q.shape[1], dims=4)
        o = self.attend(attn, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), text=text, key_mask=key_mask)
        o = o.transpose(1, 2).flatten(2).to(q.dtype)
        if not double:
            return o
        image = attn.to_out[1](attn.to_out[0](o[:, text:].contiguous()))
        return image, attn.to_add_out(o[:, :text].contiguous())

    @staticmethod
    def _project(attn, states, fused: str, names):
        """q, k, v [B, L, H, D], through one linear or three."""
        if attn.fused_projections:
            parts = getattr(attn, fused)(states).chunk(3, dim=-1)
        else:
            parts = (getattr(attn, name)(states) for name in names)
        return (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)


def _double_block(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None,
                  joint_attention_kwargs=None):
    """A FluxTransformerBlock: both streams are normed, attended to together, gated, and go through their own MLP."""
    extra = joint_attention_kwargs or {}
    if "ip_hidden_states" in extra:    # an image prompt has a third output
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, extra)
    image, text = hidden_states, encoder_hidden_states
    of_image, of_text = (norm.linear(norm.silu(temb)).chunk(6, dim=1) for norm in (block.norm1, block.norm1_context))
    image_out, text_out = block.attn(
        hidden_states=modulate(block.norm1.norm, image, of_image[1], of_image[0]),
        encoder_hidden_states=modulate(block.norm1_context.norm, text, of_text[1], of_text[0]),
        image_rotary_emb=image_rotary_emb, **extra)
    image, text = gated(image, image_out, of_image[2]), gated(text, text_out, of_text[2])
    image = gated(image, block.ff(modulate(block.norm2, image, of_image[4], of_image[3])), of_image[5])
    text = gated(text, block.ff_context(modulate(block.norm2_context, text, of_text[4], of_text[3])), of_text[5])
    return text, image


def _single_block(block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None,
                  joint_attention_kwargs=None):
    """A FluxSingleTransformerBlock: attention and MLP side by side over text and image."""
    text = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)
    y = modulate(block.norm.norm, x, scale, shift)
    attended = block.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    y = block.proj_out(torch.cat([attended, linear_then_gelu(block.proj_mlp, block.act_mlp, y)], dim=2))
    x = gated(x, y, gate)
    return x[:, :text], x[:, text:]


def _double_fits(block) -> bool:
    return plain_norms(block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context)


def _single_fits(block) -> bool:
    return plain_norms(block.norm.norm)


def _find(model) -> list[Site]:
    double = len(model.transformer_blocks)
    sites = [Site(f"transformer_blocks.{i}.attn", i) for i in range(double)]
    for i in range(len(model.single_transformer_blocks)):
        block = f"single_transformer_blocks.{i}"
        sites.append(Site(f"{block}.attn", double + i, block=block))
    return sites


def _grid(model, inputs) -> tuple[int, int, int]:
    """Only the values of `img_ids` tell the image's shape: one host read a call, and a graph break under compile."""
    ids = inputs["img_ids"]
    height, width = (ids[..., 1:].reshape(-1, 2).amax(0) + 1).tolist()
    return 1, int(height), int(width)


def _sampler_refusal(pipe) -> str | None:
    if getattr(pipe, "controlnet", None) is not None:
        return "its ControlNet runs beside the model with a batch of its own"
    return None


ADAPTER = Adapter(
    family="Flux",
    model_classes=("FluxTransformer2DModel",),
    attention=AttentionSites(
        find=_find, processor=FluxSparseProcessor, originals=("FluxAttnProcessor",), grid=_grid, joint=True,
    ),
    linear_names=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_qkv", "attn.to_out.0",
                  "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_added_qkv", "attn.to_add_out",
                  "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    linear_within=("transformer_blocks", "single_transformer_blocks"),
    batch_kwargs=("encoder_hidden_states", "pooled_projections", "guidance"),
    shared_kwargs=("img_ids", "txt_ids"),
    timestep_scale=1 / 1000,
    pipelines=("FluxPipeline",),
    sampler_refusal=_sampler_refusal,
    fused_blocks={"FluxTransformerBlock": (_double_block, _double_fits),
                  "FluxSingleTransformerBlock": (_single_block, _single_fits)},
)
