"""Self-attention of diffusers' `Attention` module: `attn1` of a BasicTransformerBlock (DiT, PixArt, UNet)."""

from __future__ import annotations

from triskele.diffusers.interface import Site
from triskele.diffusers.modulation import gated, modulate, plain_norms
from triskele.diffusers.processor import SparseProcessor, key_mask_of

ORIGINALS = ("AttnProcessor2_0", "AttnProcessor", "FusedAttnProcessor2_0", "SlicedAttnProcessor",
             "XFormersAttnProcessor")
"""Processors that compute exact softmax attention, each in its own way."""


class BasicSparseProcessor(SparseProcessor):
    """Follows AttnProcessor2_0 step by step: 4-D inputs, group norm, query and key norms, residual, rescaling."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_ignored):
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states: expected None for self-attention, got a tensor")
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if image is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        key_mask = key_mask_of(attention_mask, hidden_states.shape[0], hidden_states.shape[1], dims=3)

        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        o = self.attend(attn, q, k, v, key_mask=key_mask)
        o = o.transpose(1, 2).flatten(2).to(q.dtype)
        o = attn.to_out[1](attn.to_out[0](o))

        if image is not None:
            o = o.transpose(1, 2).unflatten(2, tuple(image))
        if attn.residual_connection:
            o = o + residual
        return o / attn.rescale_output_factor


def fused_block(block, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                timestep=None, cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None):
    """A BasicTransformerBlock of DiT ("ada_norm_zero") or PixArt ("ada_norm_single")."""
    x, extra = hidden_states, cross_attention_kwargs or {}
    if block.norm_type == "ada_norm_zero":
        first, second = block.norm1.norm, block.norm3
        embedded = block.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        rows = block.norm1.linear(block.norm1.silu(embedded)).chunk(6, dim=1)
    else:
        first, second = block.norm1, block.norm2
        rows = (block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)).unbind(1)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows    # [B, C] each
    y = block.attn1(modulate(first, x, scale_1, shift_1), attention_mask=attention_mask, **extra)
    x = gated(x, y, gate_1)
    if block.attn2 is not None:
        x = x + block.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask,
                            **extra)
    return gated(x, block.ff(modulate(second, x, scale_2, shift_2)), gate_2)


def fits_fused_block(block) -> bool:
    if block.pos_embed is not None or block.only_cross_attention or hasattr(block, "fuser"):
        return False
    if block.norm_type == "ada_norm_zero":
        return block.attn2 is None and block.norm1.emb is not None and plain_norms(block.norm1.norm, block.norm3)
    return block.norm_type == "ada_norm_single" and plain_norms(block.norm1, block.norm2)


FUSED_BLOCKS = {"BasicTransformerBlock": (fused_block, fits_fused_block)}


def block_sites(model) -> list[Site]:
    """The `attn1` of every transformer block, of models that are a plain stack of them (DiT, PixArt)."""
    return [Site(f"transformer_blocks.{i}.attn1", i) for i in range(len(model.transformer_blocks))]


def patch_grid(model, inputs) -> tuple[int, int, int]:
    """(1, rows, columns) of tokens of a picture cut into square patches."""
    height, width = inputs["hidden_states"].shape[-2:]
    return 1, height // model.config.patch_size, width // model.config.patch_size
