"""The module that stands in for a self-attention's softmax: routing, sparse-linear attention, and its parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triskele.checks import check_int
from triskele.configs import SLA
from triskele.ops import route_blocks, sparse_linear_attention


class _Projection(nn.Linear):
    """A linear whose call gives its weight and bias, which the op folds in.

    It is called, not just read, so that the hooks of CPU offload run: they fetch a module's weights around its forward.
    The views outlive what those hooks put back.
    """

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight.view_as(self.weight), self.bias.view_as(self.bias)


class SparseLinearAttention(nn.Module):
    """o = o_sparse + proj(o_linear), or alpha o_sparse + (1 - alpha) o_linear, over blocks routed from q and k.

    Parameters by `config.linear`:
        "proj"   `proj`, a Linear(head_dim, head_dim) shared by the heads that starts at zero, as published;
        "alpha"  `alpha` [num_heads or 1, 1], starts at 1; its clamp to [0, 1] is what mixes, and its gradient passes
                 through the clamp, so a value that has left the interval can come back;
        "none"   none.
    Until trained, all three give the sparse branch alone; with config.keep = 1.0 that is dense attention.

    Sequences shorter than a block are one block. Input [B, H, L, head_dim], any strides.
    """

    def __init__(self, head_dim: int, config: SLA | None = None, num_heads: int | None = None, device=None, dtype=None):
        super().__init__()
        check_int("head_dim", head_dim, low=1, high=256)
        if num_heads is not None:
            check_int("num_heads", num_heads, low=1)
        self.head_dim, self.num_heads = head_dim, num_heads
        self.config = SLA() if config is None else config
        if self.config.linear == "proj":
            self.proj = _Projection(head_dim, head_dim, device=device, dtype=dtype)
        elif self.config.linear == "alpha":
            self.alpha = nn.Parameter(torch.empty(num_heads or 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the sparse branch alone."""
        if self.config.linear == "proj":
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
        elif self.config.linear == "alpha":
            nn.init.ones_(self.alpha)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep_keys=None, key_mask: Tensor | None = None) -> Tensor:
        """q, k, v [B, H, L, head_dim] -> [B, H, Lq, head_dim]; keep_keys and key_mask as in `route_blocks`."""
        config = self.config
        block_map = route_blocks(q, k, keep=config.keep, drop=config.drop, block_q=config.block_q,
                                 block_k=config.block_k, keep_keys=keep_keys, key_mask=key_mask, backend=config.backend)
        branch = {}
        if config.linear == "proj":
            branch = dict(zip(("proj_weight", "proj_bias"), self.proj()))
        elif config.linear == "alpha":
            branch = {"alpha": self.alpha + (self.alpha.clamp(0, 1) - self.alpha).detach()}
        return sparse_linear_attention(q, k, v, block_map, block_q=config.block_q, block_k=config.block_k,
                                       feature_map=config.feature_map, scope=config.scope, key_mask=key_mask,
                                       backend=config.backend, **branch)

    def extra_repr(self) -> str:
        c = self.config
        return (f"head_dim={self.head_dim}, keep={c.keep}, drop={c.drop}, block_q={c.block_q}, block_k={c.block_k}, "
                f"feature_map={c.feature_map!r}, scope={c.scope!r}, linear={c.linear!r}")
