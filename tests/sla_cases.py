"""What the SLA tests share: the published vectors as calls, random problems, and the reference at any precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from conftest import VECTORS, Vectors

from triskele.ops import route_blocks, sparse_linear_attention
from triskele.ops.sla import reference
from triskele.ops.sla.reference import Settings

FEATURES = ("softmax", "elu", "relu")
SCOPES = ("all", "complement", "marginal")
SHAPES = [  # shape, Lk, block_q, block_k, mask: ragged last blocks, blocks of one, D no vector divides, cross lengths
    ((1, 2, 200, 64), None, 64, 32, False),
    ((2, 1, 63, 72), 130, 16, 24, True),
    ((1, 1, 65, 1), 33, 7, 5, False),
    ((1, 2, 40, 33), 41, 1, 1, True),
    ((1, 1, 150, 256), None, 100, 200, False),
]


@dataclass
class Published:
    """One vector file: its inputs in `dtype`, the settings of the call, and what came out."""

    vectors: Vectors
    dtype: torch.dtype

    def __post_init__(self):
        meta = self.vectors.metadata
        inputs = Vectors(VECTORS / "attention" / meta["inputs_file"])
        self.q, self.k, self.v, self.do = (inputs[n].to(self.dtype) for n in ("q", "k", "v", "do"))
        self.weight, self.bias = inputs["proj_weight"].to(self.dtype), inputs["proj_bias"].to(self.dtype)
        self.map = (self.vectors["sparse_map"] == 1).to(torch.int8)
        self.blocks = {"block_q": int(meta["BLKQ"]), "block_k": int(meta["BLKK"])}
        self.feature = meta["feature_map"]
        self.scope = "all" if meta["kind"] == "sla_main" else "complement"
        self.rows = self.vectors["rows"].long()
        self.half = meta["compute_dtype"] == "float16"
        self.keep = float(meta["topk_ratio"])

    def attend(self, backend, **kwargs):
        return sparse_linear_attention(
            self.q, self.k, self.v, self.map, **self.blocks, feature_map=self.feature, scope=self.scope,
            proj_weight=self.weight, proj_bias=self.bias, backend=backend, **kwargs)


def problem(shape, lk=None, dtype=torch.float32, block_q=64, block_k=32, keep=0.3, drop=0.2, mask=False, seed=0):
    """(q, k, v, map, key_mask) of [B, H, Lq, D] and Lk keys, routed; the last row of blocks keeps nothing."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dim = shape
    q, k, v = (torch.randn(batch, heads, n, dim, generator=generator).to(dtype)
               for n in (length, lk or length, lk or length))
    key_mask = None
    if mask:
        key_mask = torch.rand(batch, k.shape[2], generator=generator) > 0.3
        key_mask[0, :block_k] = False
    block_map = route_blocks(q, k, keep=keep, drop=drop, block_q=block_q, block_k=block_k, key_mask=key_mask)
    block_map[:, :, -1] = 0
    return q, k, v, block_map, key_mask


def at_precision(compute, q, k, v, block_map, settings: Settings, weight=None, bias=None, alpha=None, key_mask=None):
    """The reference's (o, o_sparse, o_linear, lse), all arithmetic and results in `compute`."""
    o_sparse, o_linear, lse = reference.branches(q, k, v, block_map, key_mask, settings, True, compute)
    o = o_sparse
    if weight is not None:
        o = o_sparse + o_linear @ weight.to(compute).mT + bias.to(compute)
    if alpha is not None:
        mix = alpha.to(compute)[..., None]
        o = mix * o_sparse + (1 - mix) * o_linear
    return o, o_sparse, o_linear, lse
