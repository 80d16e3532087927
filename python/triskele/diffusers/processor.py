"""What every family's attention processor shares: the call of the sparse attention between its projections."""

from __future__ import annotations

import torch

from triskele.checks import expected

SLA_CHILD = "triskele_sla"
VMOBA_CHILD = "triskele_vmoba"
"""Names under which the sparse attention hangs on an attention module: a child, so that its parameters are saved, moved
and trained with the model."""


class SparseProcessor:
    """Base of the families' processors. Not a module: the parameters live in the attention module's child.

    child  SLA_CHILD or VMOBA_CHILD
    grid   TokenGrid that the model's pre-hook fills (VMoBA), else None
    text   TextLength that the block's pre-hook fills, where text and image arrive joined, else None
    """

    _attention_backend = None  # diffusers' setters skip, in silence, a processor without these two
    _parallel_config = None

    def __init__(self, child: str, grid=None, text=None):
        self.child = child
        self.grid = grid
        self.text = text

    def attend(self, attn, q, k, v, *, text: int = 0, key_mask=None):
        """q, k, v [B, H, L, D] -> [B, H, L, D]; the first `text` keys are always kept."""
        if self._parallel_config is not None:
            raise ValueError("context parallelism: expected none on a model with sparse attention (each device would "
                             "route its own part of the tokens); restore() the patch, or disable it")
        # Autocast knows torch's own attention, not this op; and a norm may have answered in float32.
        device = q.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        core = getattr(attn, self.child)
        if self.child == SLA_CHILD:
            return core(q, k, v, keep_keys=[(0, text)] if text else None, key_mask=key_mask)
        if key_mask is not None:
            raise ValueError("attention_mask: expected None with VMoBA, which attends to whole chunks")
        where = {"text": text} if text else {}
        return core(q, k, v, self.size(q.shape[2] - text), dense=self.grid.dense, **where)

    def size(self, tokens: int) -> tuple[int, int, int]:
        """The grid (t, h, w) of this layer's tokens, the text not counted."""
        size = self.grid.size
        if size is None or size[0] * size[1] * size[2] != tokens:
            raise ValueError(f"token grid: expected {tokens} tokens, got the grid {size}; the model's forward writes "
                             "it, so call the model, not one of its blocks")
        return size

    def text_tokens(self) -> int:
        """Text tokens in front, from the block's hook."""
        if self.text.tokens is None:
            raise ValueError("text length: expected the block's forward to have run before its attention")
        return self.text.tokens


def key_mask_of(mask: torch.Tensor | None, batch: int, keys: int, dims: int) -> torch.Tensor | None:
    """bool [B, Lk] of the keys that are seen, from a mask as the original processor takes it.

    mask  with `dims` axes, [B or 1, 1, ..., Lk]: bool (True: seen), or a bias that is 0 or at most -1000. A mask that
          differs by query or head, or a bias in between, is a ValueError: sparse attention hides whole keys or none.
    """
    if mask is None:
        return None
    rows = mask.shape[0]  # `not in (1, batch)` would be wrong for the symbolic sizes of torch.compile
    if mask.dim() != dims or mask.shape[-1] != keys or (rows != 1 and rows != batch) \
            or any(size != 1 for size in mask.shape[1:-1]):
        want = f"[{batch}, {'1, ' * (dims - 2)}{keys}], one value a key"
        raise expected("attention_mask with sparse attention", want, list(mask.shape))
    flat = mask.reshape(mask.shape[0], keys)
    if flat.dtype != torch.bool:
        if not torch.compiler.is_compiling() and not ((flat == 0) | (flat <= -1000)).all():
            raise expected("attention_mask with sparse attention", "a bias of 0 (seen) or at most -1000 (hidden)",
                           "values in between")
        flat = flat > -1000
    return flat.expand(batch, keys)
