"""SLA: routing, forward and backward. Mostly blocks of 128 x 64: some kernels take no others."""

from __future__ import annotations

import itertools

import torch
from sla_cases import at_precision, problem
from tolerance import assert_within_budget

from gpu.family import Case, Op
from triskele.ops.sla import reference
from triskele.ops.sla.reference import Settings

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = {  # shape [B, H, Lq, D], Lk, block_q, block_k, key mask
    "ragged": ((1, 2, 300, 64), None, 128, 64, False),
    "masked": ((2, 1, 333, 72), 130, 128, 64, True),
    "wide": ((1, 2, 257, 128), None, 128, 64, False),
    "narrow": ((1, 1, 190, 32), 70, 128, 64, True),
    "one token": ((1, 1, 1, 64), 1, 128, 64, False),
    "blocks of 64 and 32": ((1, 2, 200, 80), None, 64, 32, False),
    "blocks of 16": ((2, 1, 63, 72), 130, 16, 16, True),
    "odd blocks": ((1, 1, 150, 64), 90, 100, 24, True),
}
MEDIUM = {
    "2048 tokens": ((1, 4, 2048, 128), None, 128, 64, False),
    "1000 tokens": ((2, 2, 1000, 64), 1537, 128, 64, True),
}
SHAPES = SMALL | MEDIUM


def _rough(inputs, compute) -> tuple:
    """The reference's results at the precision of the inputs. float16 would overflow in sums that a kernel keeps in
    float32: there it is what bfloat16 loses, over the three bits that float16 has more."""
    q, k, v, block_map, settings, rest = inputs
    if q.dtype != F16:
        return compute(q.dtype, q, k, v, block_map, settings, **rest)
    exact = compute(torch.float64, q, k, v, block_map, settings, **rest)
    rough = compute(B16, q, k, v, block_map, settings, **rest)
    return tuple(e + (r.double() - e) / 8 for e, r in zip(exact, rough))


# ------------------------------------------------------------------------------------------------ forward

def _forward(shape, dtype, feature="softmax", scope="all", branch="projection", *, parts=True, outliers=False):
    def make(seed):
        size, lk, block_q, block_k, masked = SHAPES[shape]
        q, k, v, block_map, key_mask = problem(size, lk, dtype, block_q, block_k, mask=masked, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        dim = size[3]
        if outliers:
            spikes = torch.rand(k.shape, generator=generator) < 0.01
            k, v = torch.where(spikes, 10 * k, k), torch.where(spikes.roll(1, -1), 100 * v, v)
        if key_mask is not None:  # nobody may look at what is masked
            k, v = (x.masked_fill(~key_mask[:, None, :, None], float("nan")) for x in (k, v))
        weight = bias = alpha = None
        if branch == "projection":
            weight = (torch.randn(dim, dim, generator=generator) * dim**-0.5).to(dtype)
            bias = torch.randn(dim, generator=generator).to(dtype)
        elif branch == "alpha":
            alpha = torch.rand(size[:3], generator=generator).to(dtype)
        return (q, k, v, block_map, weight, bias, alpha, key_mask, block_q, block_k, feature, scope, dim**-0.5, parts)

    name = f"{shape}, {str(dtype)[6:]}, {feature}, {scope}, {branch}{', outliers' if outliers else ''}"
    return Case(name, make, medium=shape in MEDIUM,
                thorough=shape in ("ragged", "masked") and dtype is B16 and feature == "softmax" and not outliers)


def compare_forward(arguments, got, exact):
    q, k, v, block_map, weight, bias, alpha, key_mask, block_q, block_k, feature, scope, scale, parts = arguments
    rest = dict(weight=weight, bias=bias, alpha=alpha, key_mask=key_mask)
    if q.dtype == F16 and k.shape[2]:
        rest = {name: x if x is None or name == "key_mask" else x.double() for name, x in rest.items()}
    rough = _rough((q, k, v, block_map, Settings(block_q, block_k, feature, scope, scale), rest), at_precision)
    for name, a, e, r in list(zip(("o", "o_sparse", "o_linear"), got, exact, rough))[:3 if parts else 1]:
        assert a.dtype == q.dtype, f"{name}: {a.dtype}"
        assert_within_budget(a, e, r, what=name)
    lse, truth = got[3].double(), exact[3].double()
    assert torch.equal(lse.isneginf(), truth.isneginf()), "lse: rows without a key"
    seen = truth.isfinite()
    error = (lse - truth)[seen].abs()
    assert not error.numel() or error.max() <= 2e-5 * max(1.0, float(truth[seen].abs().max())), \
        f"lse: error {error.max():.3e}"


def _empty(lq, lk):
    def make(seed):
        q, k = torch.randn(1, 2, lq, 64).to(B16), torch.randn(1, 2, lk, 64).to(B16)
        block_map = torch.ones(1, 2, -(-lq // 128), -(-lk // 64), dtype=torch.int8)
        projection = torch.eye(64, dtype=B16), torch.zeros(64, dtype=B16)
        return (q, k, k.clone(), block_map, *projection, None, None, 128, 64, "softmax", "all", 0.125, True)

    return Case(f"{lq} queries, {lk} keys", make)


FORWARD = Op("sla.forward", "sla_attention", (
    *(_forward("ragged", B16, feature, scope) for feature, scope in
      itertools.product(("softmax", "elu", "relu"), ("all", "complement", "marginal"))),
    *(_forward(shape, dtype) for shape in SMALL for dtype in (F32, B16, F16) if (shape, dtype) != ("ragged", B16)),
    *(_forward("masked", B16, "softmax", scope, branch) for scope in ("complement", "marginal")
      for branch in ("alpha", "none")),
    _forward("wide", B16, branch="none", parts=False), _forward("wide", B16, "elu", "complement", "alpha", parts=False),
    *(_forward("masked", dtype, outliers=True) for dtype in (F32, B16)),
    _empty(0, 8), _empty(8, 0),
    *(_forward(shape, dtype, "softmax", scope) for shape in MEDIUM for dtype, scope in
      ((B16, "all"), (B16, "marginal"), (F16, "complement"))),
), compare_forward, relaid=(0, 1, 2, 3, 4, 5))


# ------------------------------------------------------------------------------------------------ backward

def _backward(shape, dtype, feature="softmax", scope="all", *, linear=True, d_lse=False):
    def make(seed):
        size, lk, block_q, block_k, masked = SHAPES[shape]
        q, k, v, block_map, key_mask = problem(size, lk, dtype, block_q, block_k, mask=masked, seed=seed)
        if key_mask is not None:
            k, v = (x.masked_fill(~key_mask[:, None, :, None], float("nan")) for x in (k, v))
        settings = Settings(block_q, block_k, feature, scope, size[3]**-0.5)
        _, o_sparse, o_linear, lse = reference.forward(q, k, v, block_map, None, None, None, key_mask, settings, True)
        generator = torch.Generator().manual_seed(seed + 1)
        wide = torch.promote_types(dtype, F32)
        d_sparse, d_linear = (torch.randn(size, generator=generator).to(wide) for _ in range(2))
        d_sparse = d_sparse.to(dtype).to(wide)  # the gradient of o itself, where there is a projection
        grad_lse = torch.randn(size[:3], generator=generator) if d_lse else None
        return (q, k, v, block_map, o_sparse, o_linear if linear else None, lse, d_sparse,
                d_linear if linear else None, grad_lse, key_mask, block_q, block_k, feature, scope, settings.scale)

    name = (f"{shape}, {str(dtype)[6:]}, {feature}, {scope}{'' if linear else ', sparse alone'}"
            f"{', with d lse' if d_lse else ''}")
    return Case(name, make, medium=shape in MEDIUM,
                thorough=shape in ("ragged", "masked") and dtype is B16 and feature == "softmax" and linear)


def compare_backward(arguments, got, exact):
    (q, k, v, block_map, saved, _, _, d_sparse, d_linear, d_lse, key_mask, block_q, block_k, feature, scope,
     scale) = arguments
    settings = Settings(block_q, block_k, feature, scope, scale)
    # A kernel takes rowsum(dO O) from the saved, rounded O; its error reaches q and k as a gradient of lse would.
    truth = reference.branches(q, k, v, block_map, key_mask, settings, False)[0]
    offset = (d_sparse.double() * (truth - saved.double())).sum(-1) * (8 if q.dtype == F16 else 1)

    def gradients(compute, q, k, v, block_map, settings, key_mask):
        leaves = [x.to(compute).detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            o_sparse, o_lin, lse = reference.branches(*leaves, block_map, key_mask, settings, d_linear is not None,
                                                      compute)
            terms = [(o_sparse * d_sparse.to(compute)).sum()]
            if d_linear is not None:
                terms.append((o_lin * d_linear.to(compute)).sum())
            lse = lse.masked_fill(lse.isneginf(), 0)
            if d_lse is not None:
                terms.append((lse * d_lse.to(compute)).sum())
            if compute != torch.float64:
                terms.append((lse * offset.to(compute)).sum())
            return torch.autograd.grad(sum(terms), leaves)

    rough = _rough((q, k, v, block_map, settings, dict(key_mask=key_mask)), gradients)
    shown = v if key_mask is None else v.masked_fill(~key_mask[:, None, :, None], 0)
    terms = float((d_sparse.float().abs() @ shown.float().abs().mT).max() * q.float().abs().max()) * scale
    for name, a, e, r in zip(("dq", "dk", "dv"), got, exact, rough):
        assert a.dtype == q.dtype, f"{name}: {a.dtype}"
        # two roundings: sums over blocks are rounded once more than the reference's dense ones. Where a row sees few
        # keys its terms cancel, and they do so in float32.
        floor = max(2 * torch.finfo(a.dtype).eps * float(e.abs().max()), torch.finfo(F32).eps * terms)
        assert_within_budget(a, e, r, floor=floor, what=name)


BACKWARD = Op("sla.backward", "sla_backward", (
    *(_backward("ragged", B16, feature, scope) for feature, scope in
      itertools.product(("softmax", "elu", "relu"), ("all", "complement", "marginal"))),
    *(_backward(shape, dtype) for shape in SMALL for dtype in (F32, B16, F16) if (shape, dtype) != ("ragged", B16)),
    _backward("wide", B16, linear=False), _backward("masked", B16, linear=False, d_lse=True),
    _backward("masked", B16, scope="marginal", d_lse=True), _backward("masked", F32, "elu", "complement", d_lse=True),
    *(_backward(shape, B16, "softmax", scope) for shape in MEDIUM for scope in ("all", "marginal")),
), compare_backward, relaid=(0, 1, 2, 3, 4, 5, 7, 8))


# ------------------------------------------------------------------------------------------------ routing

def _route(size, lk, block_q, block_k, dtype, keep, drop=0, *, masked=False, kept=False, exact=False, medium=False):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        batch, heads, length, dim = size
        lengths = length, lk or length
        if exact:  # sums of small integers over powers of two: no rounding, so that ties are ties
            q, k = (torch.randint(-1, 2, (batch, heads, n, dim), generator=generator).to(dtype) for n in lengths)
        else:
            q, k = (torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for n in lengths)
        key_mask = keep_keys = None
        if masked:
            key_mask = torch.rand(batch, lengths[1], generator=generator) > 0.3
            key_mask[0, :block_k] = False
            k = k.masked_fill(~key_mask[:, None, :, None], float("nan"))
        if kept:
            keep_keys = torch.zeros(1, lengths[1], dtype=torch.bool)
            keep_keys[:, -1] = True
        return q, k, keep, drop, block_q, block_k, keep_keys, key_mask

    traits = "".join(f", {trait}" for trait, on in (("masked", masked), ("kept keys", kept), ("ties", exact)) if on)
    name = f"{'x'.join(map(str, size))}, {block_q} x {block_k}, {str(dtype)[6:]}, keep {keep} drop {drop}{traits}"
    return Case(name, make, medium=medium, thorough=dtype is B16 and not exact and not medium)


def compare_route(arguments, got, exact):
    """The very map; where two scores are closer than float32 resolves, either order."""
    q, k, n_keep, n_drop, block_q, block_k, _, key_mask = arguments
    got, exact = got[0], exact[0]
    assert got.dtype == torch.int8 and got.shape == exact.shape
    differ = got != exact
    if not differ.any():
        return
    queries, _ = reference.block_mean(q.double(), block_q)
    keys, seen = reference.block_mean(k.double(), block_k, key_mask)
    scores = (queries @ keys.mT).masked_fill(~seen[:, None, None, :], -torch.inf)
    ranked = scores.sort(-1, descending=True).values
    near = torch.zeros_like(differ)
    scale = 4e-6 * (queries.abs() @ keys.abs().mT).amax(-1, keepdim=True)
    for edge in (n_keep, scores.shape[-1] - n_drop):
        for rank in (edge - 1, edge):
            if 0 <= rank < scores.shape[-1]:
                near |= (scores - ranked[..., rank, None]).abs() <= scale
    wrong = (differ & ~near).nonzero()
    assert not len(wrong), f"{len(wrong)} blocks differ, first {wrong[0].tolist()}"
    assert torch.equal((got == 1).sum(-1), (exact == 1).sum(-1)), "number of critical blocks"
    assert torch.equal((got == -1).sum(-1), (exact == -1).sum(-1)), "number of negligible blocks"


ROUTE = Op("sla.route", "sla_route", (
    *(_route((1, 2, 700, 64), None, 128, 64, dtype, 3, 2) for dtype in (F32, B16, F16)),
    _route((2, 2, 333, 72), 1000, 128, 64, B16, 4, 3, masked=True), _route((2, 1, 200, 128), 513, 64, 32, B16, 5, 0),
    _route((1, 2, 700, 64), 900, 128, 64, B16, 2, 4, kept=True), _route((1, 1, 100, 80), 777, 16, 16, B16, 9, 9),
    _route((1, 2, 512, 32), None, 128, 64, F32, 3, 3, exact=True), _route((1, 2, 512, 32), 1024, 128, 64, B16, 5, 5,
                                                                          exact=True),
    _route((1, 1, 1, 64), 1, 128, 64, B16, 1), _route((1, 2, 64, 64), 640, 64, 64, B16, 10),
    _route((2, 1, 150, 64), 300, 128, 64, F32, 2, 1, masked=True, kept=True),
    _route((1, 4, 8192, 128), None, 128, 64, B16, 6, 10, medium=True),
    _route((1, 2, 32760, 64), None, 128, 64, B16, 25, 0, medium=True),
), compare_route, relaid=(0, 1))

OPS = (ROUTE, FORWARD, BACKWARD)
