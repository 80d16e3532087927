"""VMoBA where text and image tokens share one attention: the text is a chunk of its own that nobody does without."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from triskele.nn.vmoba import VMoBAAttention
from triskele.ops.vmoba import VMoBAPartition, vmoba_attention, vmoba_select


class JointVMoBAAttention(VMoBAAttention):
    """o = vmoba_attention over the chunks {text} + those of the image's grid, text tokens first.

    An image query attends to the text and to the image chunks that VMoBA selects among the image's; a text query
    attends to everything. Without text it is VMoBAAttention.
    """

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int, int],
                dense: bool = False, text: int = 0) -> torch.Tensor:
        """q, k, v [B, H, text + t h w, D] -> the same shape."""
        if text == 0:
            return super().forward(q, k, v, grid, dense)
        if dense or self.layer_index < self.config.dense_layers:
            return F.scaled_dot_product_attention(q, k, v)
        config, image = self.config, self.partition(grid, q.device)
        chosen = vmoba_select(q[:, :, text:], k[:, :, text:], chunk=image, select=config.select, pool=config.pool,
                              top_k=self.top_k, threshold=config.threshold, backend=config.backend)
        mask = F.pad(chosen, (text, 0, 0, 0, 1, 0), value=True)  # [B, C, H, S] -> [B, 1 + C, H, text + S]
        return vmoba_attention(q, k, v, chunk=with_text(image, text), mask=mask, backend=config.backend)


def with_text(image: VMoBAPartition, text: int) -> VMoBAPartition:
    """The partition of `text` tokens, as one chunk, followed by those of `image`."""
    words = torch.arange(text, device=image.order.device)
    return VMoBAPartition(torch.cat([words, image.order + text]), torch.cat([words, image.inverse + text]),
                          F.pad(image.bounds + text, (1, 0)))
