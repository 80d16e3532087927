"""VMoBA as a module: the partition that goes with a layer, and the op called on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from triskele.checks import check_int
from triskele.configs import VMoBA
from triskele.ops.vmoba import VMoBAPartition, vmoba_attention, vmoba_partition
from triskele.ops.vmoba.partition import default_chunk

KINDS = ("temporal", "spatial", "spatio-temporal")


class VMoBAAttention(torch.nn.Module):
    """o = vmoba_attention(q, k, v) over the chunks of the layer's kind: temporal, spatial, spatio-temporal in turn.

    Holds no parameters: the selection follows the keys. Layer l uses kind l mod 3 (arXiv 2506.23858, section 3.2).

    Args:
        config: `triskele.VMoBA`. `chunks` and `top_k` are read at the layer's kind; with chunks=None the chunk comes
            from the grid, about an eighth of the tokens.
        layer_index: of the attention layer in its model, from 0. Layers below `config.dense_layers` stay dense.

    Raises:
        ValueError: a layer_index below 0.
    """

    def __init__(self, config: VMoBA, layer_index: int):
        super().__init__()
        check_int("layer_index", layer_index, low=0)
        self.config = config
        self.layer_index = layer_index
        self.kind = layer_index % len(KINDS)
        self.top_k = config.top_k[self.kind] if isinstance(config.top_k, tuple) else config.top_k
        self._partitions: dict[tuple, VMoBAPartition] = {}

    def partition(self, grid: tuple[int, int, int], device: torch.device | str = "cpu") -> VMoBAPartition:
        """The layer's partition of a (t, h, w) grid, built once a grid and device."""
        key = (*grid, str(device))
        if key not in self._partitions:
            chunk = self.config.chunks[self.kind] if self.config.chunks else default_chunk(grid, self.kind)
            self._partitions[key] = vmoba_partition(grid, chunk).to(device)
        return self._partitions[key]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int, int],
                dense: bool = False) -> torch.Tensor:
        """q, k, v [B, H, S, D], S = t h w tokens in raster order -> [B, H, S, D]; `dense` attends to all tokens."""
        if dense or self.layer_index < self.config.dense_layers:
            return F.scaled_dot_product_attention(q, k, v)
        config = self.config
        return vmoba_attention(q, k, v, chunk=self.partition(grid, q.device), select=config.select, pool=config.pool,
                               top_k=self.top_k, threshold=config.threshold, backend=config.backend)

    def extra_repr(self) -> str:
        return f"layer_index={self.layer_index}, kind={KINDS[self.kind]!r}, {self.config}"
