"""Wan 2.1 and 2.2, video: `attn1` of every block is self-attention over the video tokens; `attn2` takes the text."""

from __future__ import annotations

import torch

from triskele.diffusers.interface import Adapter, AttentionSites, Site
from triskele.diffusers.modulation import gated, modulate, plain_norms
from triskele.diffusers.processor import SparseProcessor, key_mask_of


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding over interleaved pairs, as WanAttnProcessor does it: x [B, L, H, D]; cos, sin [1, L, 1, D].

    A pair is a complex number: one pass over x where the real formula makes six.
    """
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses the real formula, and generates no code for complex numbers
        even, odd = pairs.unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    turned = torch.view_as_complex(pairs.to(wide).contiguous()) * torch.complex(cos.to(wide), sin.to(wide))
    return torch.view_as_real(turned).flatten(-2).type_as(x)


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


def _block(block, hidden_states, encoder_hidden_states, temb, rotary_emb):
    """A WanTransformerBlock; temb [B, 6, C]."""
    if temb.ndim != 3:    # a timestep for every token
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
    x = hidden_states
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (block.scale_shift_table + temb.float()).unbind(1)
    x = gated(x, block.attn1(modulate(block.norm1, x, scale_1, shift_1), None, None, rotary_emb), gate_1)
    x = x + block.attn2(block.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
    return gated(x, block.ffn(modulate(block.norm3, x, scale_2, shift_2)), gate_2)


def _fits(block) -> bool:
    return plain_norms(block.norm1, block.norm3)


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
    fused_blocks={"WanTransformerBlock": (_block, _fits)},
)
