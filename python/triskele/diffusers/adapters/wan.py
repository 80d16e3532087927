"""Wan 2.1 and 2.2, video: `attn1` of every block is self-attention over the video tokens; `attn2` takes the text."""

from __future__ import annotations

import torch

from triskele.diffusers.interface import Adapter, AttentionSites, Site
from triskele.diffusers.processor import SparseProcessor, key_mask_of


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding over interleaved pairs, as WanAttnProcessor does it: x [B, L, H, D]; cos, sin [1, L, 1, D]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class WanSparseProcessor(SparseProcessor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states: expected None for self-attention, got a tensor")
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, L, H, D]
        if rotary_emb is not None:
            q, k = _rotate(q, *rotary_emb), _rotate(k, *rotary_emb)
        key_mask = key_mask_of(attention_mask, q.shape[0], q.shape[1], dims=4)
        o = self.attend(attn, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), key_mask=key_mask)
        o = o.transpose(1, 2).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](o))


def _find(model) -> list[Site]:
    return [Site(f"blocks.{i}.attn1", i) for i in range(len(model.blocks))]


def _grid(model, inputs) -> tuple[int, int, int]:
    frames, height, width = inputs["hidden_states"].shape[2:]
    pt, ph, pw = model.config.patch_size
    return frames // pt, height // ph, width // pw


def _sampler_refusal(pipe) -> str | None:
    if getattr(pipe.config, "boundary_ratio", None) is not None:
        return "Wan 2.2 A14B picks one of two models by the timestep, and a window holds several"
    if getattr(pipe.config, "expand_timesteps", False):
        return "Wan 2.2 TI2V gives every token its own timestep"
    return None


ADAPTER = Adapter(
    family="Wan",
    model_classes=("WanTransformer3DModel",),
    attention=AttentionSites(find=_find, processor=WanSparseProcessor, originals=("WanAttnProcessor",), grid=_grid),
    linear_names=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_qkv", "attn1.to_out.0",
                  "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_kv", "attn2.to_out.0",
                  "attn2.add_k_proj", "attn2.add_v_proj", "attn2.to_added_kv", "ffn.net.0.proj", "ffn.net.2"),
    linear_within=("blocks",),
    batch_kwargs=("encoder_hidden_states", "encoder_hidden_states_image"),
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    sampler_refusal=_sampler_refusal,
)
