"""Fuzz cases of block routing and sparse-linear attention, both directions."""

from __future__ import annotations

import math

import torch
from fuzz_draw import Draw
from large_scores import assert_one_key_each
from sla_cases import FEATURES, SCOPES, at_precision
from tolerance import assert_within_budget

from triskele.ops import route_blocks, sparse_linear_attention
from triskele.ops.sla.reference import Settings, block_mean


def _shapes(draw: Draw, length: int) -> tuple[int, int, int, int, int]:
    """B, H, Lq, Lk, D."""
    batch, heads = draw.random.choice((1, 1, 2, 3)), draw.random.choice((1, 2, 3))
    lq, lk = draw.size("Lq", length), draw.size("Lk", length)
    if draw.random.random() < 0.3:
        lk = draw.facts["Lk"] = lq
    if draw.random.random() < 0.03:
        batch, lq, lk = draw.choice("empty", [(0, lq, lk), (batch, 0, lk), (batch, lq, 0)])
    return batch, heads, lq, lk, draw.size("D", draw.random.choice((48, 80, 128, 256)))


def _blocks(draw: Draw) -> tuple[int, int]:
    return draw.size("block_q", 130), draw.size("block_k", 130)


def _key_mask(draw: Draw, batch: int, lk: int):
    if draw.random.random() < 0.6:
        return None
    return draw.bools("key_mask", batch, lk, share=draw.share("visible"))


def _hidden(x: torch.Tensor, key_mask, value: float) -> torch.Tensor:
    """Rows that nobody may see hold `value`; written in place, so that the layout stays. (Expanded ones are left.)"""
    if key_mask is not None and 0 not in x.stride():
        x.masked_fill_(~key_mask[:, None, :, None], value)
    return x


# ------------------------------------------------------------------------------------------------ routing

def route(draw: Draw) -> None:
    """The map of the reference, up to blocks whose scores are as good as equal."""
    dtype = draw.choice("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    batch, heads, lq, lk, dim = _shapes(draw, 400)
    block_q, block_k = _blocks(draw)
    q = draw.tensor("q", batch, heads, lq, dim, dtype=dtype)
    k = draw.tensor("k", batch, heads, lk, dim, dtype=dtype)
    key_mask = _key_mask(draw, batch, lk)
    k = _hidden(k, key_mask, math.nan)
    drop = draw.share("drop", 0, 0.99) if draw.flag("drops") else 0.0
    keep = draw.share("keep", 0.01, 1 - drop) if draw.flag("share") else draw.size("keep", 12)
    keys = None
    if draw.flag("keeps keys", 0.3):
        keys = draw.bools("keep_keys", *draw.random.choice([(lk,), (batch, lk)]), share=draw.share("kept", 0, 0.2))
    call = dict(keep=keep, drop=drop, block_q=block_q, block_k=block_k, keep_keys=keys, key_mask=key_mask)
    got = route_blocks(q, k, **call, backend="cpu")
    want = route_blocks(q, k, **call, backend="reference")
    assert got.shape == want.shape and got.dtype == want.dtype
    differ = (got != want).any(-1).nonzero()
    if not len(differ):
        return
    scores = block_mean(q.double(), block_q)[0] @ block_mean(k.double(), block_k, key_mask)[0].mT
    for b, h, row in differ.tolist():
        wrong = (got[b, h, row] != want[b, h, row]).nonzero().flatten()
        near = scores[b, h, row, wrong]
        spread = float(near.max() - near.min())
        slack = 1e-5 * float(scores[b, h, row].abs().max())
        assert spread <= slack, (
            f"map[{b}, {h}, {row}] differs at {wrong.tolist()}, whose scores spread by {spread:.3e} (tie: {slack:.1e})")


# ------------------------------------------------------------------------------------------------ attention

class _Problem:
    """One call of `sparse_linear_attention`, and the same at any precision."""

    def __init__(self, draw: Draw, length: int, train: bool):
        self.dtype = dtype = draw.choice("dtype", (torch.float32, torch.bfloat16))
        batch, heads, lq, lk, dim = _shapes(draw, length)
        self.blocks = _blocks(draw)
        self.q, self.k, self.v = (draw.tensor(n, batch, heads, length, dim, dtype=dtype, expand=not train)
                                  for n, length in (("q", lq), ("k", lk), ("v", lk)))
        self.key_mask = _key_mask(draw, batch, lk)
        _hidden(self.k, self.key_mask, math.nan)
        _hidden(self.v, self.key_mask, math.inf)
        rows, columns = -(-lq // self.blocks[0]), -(-lk // self.blocks[1])
        self.map = draw.integers("map", -1, 1, batch, heads, rows, columns)
        if draw.random.random() < 0.3:  # sparse, as in use
            self.map.clamp_(max=0)
            self.map[..., :1] = 1
        self.feature, self.scope = draw.choice("feature", FEATURES), draw.choice("scope", SCOPES)
        self.scale = draw.choice("scale", (None, None, 0.3, 1.0))
        self.branch = draw.choice("branch", ("none", "projection", "alpha"))
        self.extra = []
        wide = draw.random.choice((dtype, torch.float32))
        if self.branch == "projection":
            self.extra = [draw.tensor("weight", dim, dim, dtype=wide, scale=dim**-0.5)]
            if draw.flag("bias"):
                self.extra.append(draw.tensor("bias", dim, dtype=wide))
        if self.branch == "alpha":
            shape = draw.random.choice([(batch, heads, lq), (heads, 1), (lq,), (1,)])
            self.extra = [draw.tensor("alpha", *shape, dtype=wide)]
        self.settings = Settings(*self.blocks, self.feature, self.scope, self.scale or dim**-0.5)

    def ours(self, q, k, v, *extra, parts):
        names = {"projection": ("proj_weight", "proj_bias"), "alpha": ("alpha",), "none": ()}[self.branch]
        return sparse_linear_attention(
            q, k, v, self.map, *self.blocks, self.feature, self.scope, **dict(zip(names, extra)), backend="cpu",
            key_mask=self.key_mask, scale=self.scale, return_parts=parts)

    def exact(self, compute, q, k, v, *extra):
        """(o, o_sparse, o_linear, lse) in `compute`."""
        named = {}
        if self.branch == "projection":
            named = {"weight": extra[0], "bias": extra[1] if len(extra) > 1 else q.new_zeros(q.shape[3])}
        if self.branch == "alpha":
            named = {"alpha": extra[0].expand(q.shape[:3])}
        return at_precision(compute, q, k, v, self.map, self.settings, key_mask=self.key_mask, **named)


def forward(draw: Draw) -> None:
    p = _Problem(draw, 300, train=False)
    parts = draw.flag("parts")
    with torch.no_grad():
        got = p.ours(p.q, p.k, p.v, *p.extra, parts=parts)
    got = got if parts else (got,)
    truth = p.exact(torch.float64, p.q, p.k, p.v, *p.extra)
    rough = p.exact(p.dtype, p.q, p.k, p.v, *p.extra)
    for name, a, t, r in zip(("o", "o_sparse", "o_linear"), got, truth, rough):
        assert a.dtype == p.dtype and a.is_contiguous()
        largest = max((float(x.double().nan_to_num(0, 0, 0).abs().max()) for x in (p.v, t) if x.numel()), default=0.0)
        roundings = 4 if p.dtype == torch.bfloat16 else 16
        assert_within_budget(a, t, r, what=name, factor=3, floor=roundings * torch.finfo(p.dtype).eps * largest)
    if parts:
        seen = ~truth[3].isinf()
        assert torch.equal(~got[3].isinf(), seen), "lse: rows without keys"
        if seen.any():
            floor = 1e-5 + 8 * torch.finfo(torch.float32).eps * float(truth[3][seen].abs().max())
            assert_within_budget(got[3][seen], truth[3][seen], rough[3][seen].float(), what="lse", floor=floor)


def backward(draw: Draw) -> None:
    p = _Problem(draw, 160, train=True)
    leaves = [p.q, p.k, p.v, *p.extra]
    parts = draw.flag("parts")
    shape = p.q.shape
    upstream = [draw.tensor(f"d{i}", *(shape if i < 3 else shape[:3])) for i in range(4 if parts else 1)]
    hidden = p.key_mask is not None

    def gradients(run, precision):
        wanted = [x.detach().requires_grad_() for x in leaves]
        inputs = [x if precision is None else x.to(precision) for x in wanted]
        out = run(*inputs)
        out = list(out) if parts else [out[0] if isinstance(out, tuple) else out]
        if parts:
            out[3] = out[3].masked_fill(out[3].isinf(), 0)
        given = [u.to(o.dtype) for u, o in zip(upstream, out)]
        found = torch.autograd.grad(out, wanted[:3], given, allow_unused=True)
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted)]
        return [g.double() for g in found], [o.detach() for o in out]

    got, out = gradients(lambda *x: p.ours(*x, parts=parts), None)
    if 0 in shape:  # no query: nothing reaches k and v
        assert not any(g.any() for g in got)
        return
    leaves = [x.double() for x in leaves]
    truth, _ = gradients(lambda *x: p.exact(torch.float64, *x), torch.float64)
    rough, _ = gradients(lambda *x: p.exact(p.dtype, *x), p.dtype)
    # The saved outputs are rounded to the dtype: each row's sum of dO O carries that, times the scale and a key.
    eps = torch.finfo(p.dtype).eps
    pieces = sum(float((u.double() * o.double()).norm(dim=-1).max()) if u.dim() == 4 and u.numel() else 0.0
                 for u, o in zip(upstream, out))
    widest = max((float(x.nan_to_num(0, 0, 0).abs().max()) for x in leaves[:3] if x.numel()), default=0.0)
    slack = 16 * eps * p.settings.scale * pieces * widest * math.sqrt(max(1, shape[2]))
    for name, a, t, r in zip(("dq", "dk", "dv"), got, truth, rough):
        if hidden and name != "dq" and a.numel():
            assert not a[~p.key_mask[:, None, :, None].expand_as(a)].any(), f"{name} of hidden keys"
        largest = float(t.abs().max()) if t.numel() else 0.0
        assert_within_budget(a, t, r, what=name, factor=4, floor=slack + 8 * eps * largest)


def large(draw: Draw) -> None:
    """Scores of any size: everything stays finite, and a row that clearly sees one key is its value."""
    p = _Problem(draw, 160, train=True)
    with torch.no_grad():
        for x in (p.q, p.k):
            x.mul_(10.0 ** draw.share("magnitude", 0, 8))
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v, *p.extra)]
    o, o_sparse, *_ = p.ours(*leaves, parts=True)
    rows, columns = (p.map == 1).repeat_interleave(p.blocks[0], 2), p.k.shape[2]
    seen = rows[:, :, :p.q.shape[2]].repeat_interleave(p.blocks[1], 3)[..., :columns]
    if p.key_mask is not None:
        seen = seen & p.key_mask[:, None, None, :]
    if not o.numel() or not columns:
        return
    assert_one_key_each(o_sparse.detach(), p.q, p.k, p.v, seen, p.settings.scale)
    assert o.isfinite().all()
    for name, grad in zip(("dq", "dk", "dv"), torch.autograd.grad(o.float().sum(), leaves[:3])):
        assert grad.isfinite().all(), f"{name} is not finite"


CASES = {"sla.route": route, "sla.forward": forward, "sla.backward": backward, "sla.large": large}
