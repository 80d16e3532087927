"""One step of triangular Anderson acceleration: two passes over the window and the small solve between them, without a
word to the host. Contracts: python/triskele/ops/taa/api.py.

    residual_kernel   a program owns a stretch of elements and walks the rows from the top, ROWS at a time: their
                      first-order residuals, the running sum R_t = r_t + a_t R_{t+1} (an associative scan, and a carry
                      from the rows above), and each row's products, of which it leaves its share
    gather_kernel     adds the shares of a row, in float64 and in one order
    gamma_kernel      one program: suffix sums over the rows, 128 at a time, and a 4 x 4 solve for each of them
    update_kernel     x + R - Σ_q γ_q (ΔX_q + ΔR_q): rows by elements
    enter_kernel      the rows that enter below, each from the row above it

No atomics, and every sum has one order: results do not depend on scheduling. Weights come in float64 and are used in
the state's dtype. What has weight zero is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triskele.triton_kernels.configs import TAA_RESIDUAL, TAA_RESIDUAL_REGISTERS, TAA_UPDATE

SLOTS = 4  # past rounds: memory <= 5
SOLVED = tl.constexpr(128)  # rows that gamma_kernel solves at a time
GATHERED = tl.constexpr(1024)  # shares that gather_kernel adds at a time
SIZES = ["window", "eps_rows", "depth", "order", "programs", "n0", "n1", "n2", "n3", "slots", "count"]


# ------------------------------------------------------------------------------------------------ pass one

@triton.jit
def _wide(n):
    """int64, of an integer of any kind: a loop's variable, an argument that was specialised."""
    return tl.full([], 0, tl.int64) + n


@triton.jit
def _chain(above_a, above_r, a, r):
    """R = r + a R', composed with R' = above_r + above_a R''."""
    return above_a * a, r + a * above_r


@triton.jit
def _rows(base, rows, cols, size, mask):
    """base[rows, cols], zero outside the mask."""
    return tl.load(base + rows.to(tl.int64)[:, None] * size + cols[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def residual_kernel(x, eps, noise, a, b, c, p0, p1, p2, p3, out, first_order, shares, size, window, eps_rows, depth,
                    order, programs, n0, n1, n2, n3, NOISE: tl.constexpr, Q: tl.constexpr, FULL: tl.constexpr,
                    ROWS: tl.constexpr, COLS: tl.constexpr):
    """p_q, n_q: R of the q-th newest round and its rows. FULL: order >= window. Otherwise the terms of a row are read
    again from `first_order` [window, size], where the program left them on its way down."""
    state: tl.constexpr = x.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    cols = pid * COLS + tl.arange(0, COLS)
    inside = (cols < size)[None, :]
    past, lengths = (p0, p1, p2, p3), (n0, n1, n2, n3)
    carry = tl.zeros([COLS], state)
    top_row = (tl.arange(0, ROWS) == 0)[:, None]
    for u in range(0, window, ROWS):
        rows = window - 1 - u - tl.arange(0, ROWS)  # from the top
        live = rows >= 0
        mask = live[:, None] & inside
        scale = tl.load(a + rows, mask=live, other=0.0).to(state)
        r = scale[:, None] * _rows(x, rows + 1, cols, size, mask) - _rows(x, rows, cols, size, mask)
        for d in range(0, depth):
            weight = tl.load(b + rows.to(tl.int64) * depth + d, mask=live & (rows + d < eps_rows), other=0.0)
            weight = weight.to(state)
            r += weight[:, None] * _rows(eps, rows + d, cols, size, mask & (weight != 0)[:, None]).to(state)
        if NOISE:
            weight = tl.load(c + rows, mask=live, other=0.0).to(state)
            r += weight[:, None] * _rows(noise, rows, cols, size, mask & (weight != 0)[:, None])
        if FULL:
            r0 = tl.where(top_row, r + scale[:, None] * carry[None, :], r)
            _, full = tl.associative_scan((tl.broadcast_to(scale[:, None], [ROWS, COLS]), r0), 0, _chain)
            carry = tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[:, None], full, 0.0), 0)
        else:
            place = first_order + rows.to(tl.int64)[:, None] * size + cols[None, :]
            tl.store(place, r, mask=mask)
            tl.debug_barrier()  # the rows above were stored by other threads of this program
            full, reach = r, scale
            for d in range(1, order):
                up = live & (rows + d < window)
                full += reach[:, None] * _rows(first_order, rows + d, cols, size, up[:, None] & inside)
                reach *= tl.load(a + rows + d, mask=up, other=0.0).to(state)
        tl.store(out + rows.to(tl.int64)[:, None] * size + cols[None, :], full, mask=mask)

        # Σ r², ⟨D_q, R⟩, ⟨D_p, D_q⟩ (p <= q); D is zero where the row has no such round
        share = shares + rows.to(tl.int64) * ((1 + Q + Q * (Q + 1) // 2) * programs) + pid
        tl.store(share, tl.sum(r * r, 1), mask=live)
        differences, newer = (), full
        for q in tl.static_range(Q):
            at = rows - (window - lengths[q])
            known = mask & (at >= 0)[:, None]
            older = _rows(past[q], at, cols, size, known)
            difference = tl.where(known, newer - older, 0.0)
            tl.store(share + (1 + q) * programs, tl.sum(difference * full, 1), mask=live)
            differences = differences + (difference,)  # noqa: RUF005  Triton has no starred tuples
            newer = older
        for p in tl.static_range(Q):
            for q in tl.static_range(p, Q):
                k = 1 + Q + p * Q - p * (p - 1) // 2 + q - p
                tl.store(share + k * programs, tl.sum(differences[p] * differences[q], 1), mask=live)


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(shares, squares, gram, rhs, programs, Q: tl.constexpr):
    """shares [window, stats, programs] -> one statistic of one row."""
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shares += (t * tl.num_programs(1) + s) * programs
    total = tl.zeros([GATHERED], tl.float64)
    for first in range(0, programs, GATHERED):
        at = first + tl.arange(0, GATHERED)
        total += tl.load(shares + at, mask=at < programs, other=0.0).to(tl.float64)
    value = tl.sum(total, 0)
    if s == 0:
        tl.store(squares + t, value)
    elif s <= Q:
        tl.store(rhs + t * Q + s - 1, value)
    for p in tl.static_range(Q):
        for q in tl.static_range(p, Q):
            if s == 1 + Q + p * Q - p * (p - 1) // 2 + q - p:
                tl.store(gram + (t * Q + p) * Q + q, value)
                tl.store(gram + (t * Q + q) * Q + p, value)


# ------------------------------------------------------------------------------------------------ the small solve

@triton.jit
def _suffix(source, stride, rows, live, carry):
    """(sums from each row up, the sum over all rows so far); rows descend."""
    sums = tl.cumsum(tl.load(source + rows.to(tl.int64) * stride, mask=live, other=0.0), 0) + carry
    return sums, tl.sum(tl.where(tl.arange(0, SOLVED) == SOLVED - 1, sums, 0.0), 0)


@triton.jit
def _entry(value, p, q, count):
    """The matrix of `count` unknowns, continued by that of the identity."""
    return tl.where((p < count) & (q < count), value, 1.0 if p == q else 0.0)


@triton.jit(do_not_specialize=SIZES)
def gamma_kernel(squares, gram, rhs, limits, gamma, highest, window, slots, n0, n1, n2, n3, ridges,
                 RELATIVE: tl.constexpr):
    """L D L^T on 4 unknowns a row, written out; a row of fewer is continued by the identity. A pivot that is not
    positive leaves γ = 0."""
    offsets = tl.arange(0, SOLVED)
    best = tl.zeros([SOLVED], tl.int32)
    for first in range(0, window, SOLVED):
        t = first + offsets
        open_ = tl.load(squares + t, mask=t < window, other=0.0) > tl.load(limits + t, mask=t < window, other=0.0)
        best = tl.maximum(best, tl.where(open_ & (t < window), t, 0))
    top = tl.max(best, 0)
    tl.store(highest, top.to(tl.int64))
    ridge, zero = tl.load(ridges), tl.full([], 0.0, tl.float64)
    s00, s01, s02, s03, s11, s12, s13, s22, s23, s33 = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    b0, b1, b2, b3 = zero, zero, zero, zero
    square = slots * slots
    for first in range(0, window, SOLVED):
        t = window - 1 - first - offsets
        have = tl.where(t >= 0, slots, 0)  # unknowns that the arrays hold
        m00, s00 = _suffix(gram, square, t, have > 0, s00)
        m01, s01 = _suffix(gram + 1, square, t, have > 1, s01)
        m02, s02 = _suffix(gram + 2, square, t, have > 2, s02)
        m03, s03 = _suffix(gram + 3, square, t, have > 3, s03)
        m11, s11 = _suffix(gram + slots + 1, square, t, have > 1, s11)
        m12, s12 = _suffix(gram + slots + 2, square, t, have > 2, s12)
        m13, s13 = _suffix(gram + slots + 3, square, t, have > 3, s13)
        m22, s22 = _suffix(gram + 2 * slots + 2, square, t, have > 2, s22)
        m23, s23 = _suffix(gram + 2 * slots + 3, square, t, have > 3, s23)
        m33, s33 = _suffix(gram + 3 * slots + 3, square, t, have > 3, s33)
        r0, b0 = _suffix(rhs, slots, t, have > 0, b0)
        r1, b1 = _suffix(rhs + 1, slots, t, have > 1, b1)
        r2, b2 = _suffix(rhs + 2, slots, t, have > 2, b2)
        r3, b3 = _suffix(rhs + 3, slots, t, have > 3, b3)

        count = ((t >= window - n0) & (have > 0)).to(tl.int32) + ((t >= window - n1) & (have > 1)).to(tl.int32)
        count += ((t >= window - n2) & (have > 2)).to(tl.int32) + ((t >= window - n3) & (have > 3)).to(tl.int32)
        mean = tl.where(count > 0, m00, 0.0) + tl.where(count > 1, m11, 0.0)
        mean += tl.where(count > 2, m22, 0.0) + tl.where(count > 3, m33, 0.0)
        mean /= tl.maximum(count, 1).to(tl.float64)
        weight = ridge * mean if RELATIVE else ridge + tl.zeros([SOLVED], tl.float64)
        a00, a11 = _entry(m00 + weight, 0, 0, count), _entry(m11 + weight, 1, 1, count)
        a22, a33 = _entry(m22 + weight, 2, 2, count), _entry(m33 + weight, 3, 3, count)
        a01, a02, a03 = _entry(m01, 0, 1, count), _entry(m02, 0, 2, count), _entry(m03, 0, 3, count)
        a12, a13, a23 = _entry(m12, 1, 2, count), _entry(m13, 1, 3, count), _entry(m23, 2, 3, count)

        l1, l2, l3 = a01 / a00, a02 / a00, a03 / a00
        d1, e12, e13 = a11 - l1 * a01, a12 - l1 * a02, a13 - l1 * a03
        k2, k3 = e12 / d1, e13 / d1
        d2, e23 = a22 - l2 * a02 - k2 * e12, a23 - l2 * a03 - k2 * e13
        j3 = e23 / d2
        d3 = a33 - l3 * a03 - k3 * e13 - j3 * e23
        y0 = tl.where(count > 0, r0, 0.0)
        y1 = tl.where(count > 1, r1, 0.0) - l1 * y0
        y2 = tl.where(count > 2, r2, 0.0) - l2 * y0 - k2 * y1
        y3 = tl.where(count > 3, r3, 0.0) - l3 * y0 - k3 * y1 - j3 * y2
        g3 = y3 / d3
        g2 = y2 / d2 - j3 * g3
        g1 = y1 / d1 - k2 * g2 - k3 * g3
        g0 = y0 / a00 - l1 * g1 - l2 * g2 - l3 * g3

        good = (count > 0) & (mean > 0) & (t < top) & (a00 > 0) & (d1 > 0) & (d2 > 0) & (d3 > 0)
        size = tl.abs(g0) + tl.abs(g1) + tl.abs(g2) + tl.abs(g3)
        good = good & (size < float("inf"))  # false for NaN too
        place = gamma + t.to(tl.int64) * slots
        tl.store(place, tl.where(good, g0, 0.0), mask=have > 0)
        tl.store(place + 1, tl.where(good & (count > 1), g1, 0.0), mask=have > 1)
        tl.store(place + 2, tl.where(good & (count > 2), g2, 0.0), mask=have > 2)
        tl.store(place + 3, tl.where(good & (count > 3), g3, 0.0), mask=have > 3)


# ------------------------------------------------------------------------------------------------ pass two

@triton.jit(do_not_specialize=SIZES)
def update_kernel(x, r, x0, x1, x2, x3, r0, r1, r2, r3, gamma, out, size, window, n0, n1, n2, n3, Q: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr):
    """out [window, size]: its first row is the lowest target's."""
    state: tl.constexpr = x.dtype.element_ty
    blocks = tl.cdiv(size, COLS)
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    live, inside = rows < window, (cols < size)[None, :]
    mask = live[:, None] & inside
    past_x, past_r, lengths = (x0, x1, x2, x3), (r0, r1, r2, r3), (n0, n1, n2, n3)
    newer_x, newer_r = _rows(x, rows, cols, size, mask), _rows(r, rows, cols, size, mask)
    moved = newer_x + newer_r
    for q in tl.static_range(Q):
        at = rows - (window - lengths[q])
        known = live & (at >= 0)
        weight = tl.load(gamma + rows * Q + q, mask=known, other=0.0).to(state)
        wanted = weight != 0
        if q + 1 < Q:  # the next difference begins where this one ends
            wanted = wanted | (tl.load(gamma + rows * Q + q + 1, mask=known, other=0.0) != 0)
        wanted = wanted[:, None] & mask
        older_x, older_r = _rows(past_x[q], at, cols, size, wanted), _rows(past_r[q], at, cols, size, wanted)
        change = (newer_x - older_x) + (newer_r - older_r)
        moved -= tl.where((weight != 0)[:, None], weight[:, None] * change, 0.0)
        newer_x, newer_r = older_x, older_r
    tl.store(out + rows.to(tl.int64)[:, None] * size + cols[None, :], moved, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def enter_kernel(eps, enter_a, enter_w, enter_c, noise, out, size, count, eps_rows, NOISE: tl.constexpr,
                 COLS: tl.constexpr, STEP: tl.constexpr):
    """Rows count - 1 … 0 of out; row `count` is there already."""
    state: tl.constexpr = out.dtype.element_ty
    cols = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = cols < size
    below = tl.load(out + _wide(count) * size + cols, mask=inside, other=0.0)
    for u in range(0, count):
        j = _wide(count - 1 - u)
        below *= tl.load(enter_a + j).to(state)
        for first in range(0, eps_rows, STEP):
            s = first + tl.arange(0, STEP)
            weights = tl.load(enter_w + j * eps_rows + s, mask=s < eps_rows, other=0.0)
            if tl.max((weights != 0).to(tl.int32), 0) > 0:
                for at in range(first, tl.minimum(first + STEP, eps_rows)):
                    weight = tl.load(enter_w + j * eps_rows + at).to(state)
                    if weight != 0:
                        below += weight * tl.load(eps + _wide(at) * size + cols, mask=inside, other=0.0).to(state)
        if NOISE:
            weight = tl.load(enter_c + j).to(state)
            if weight != 0:
                below += weight * tl.load(noise + j * size + cols, mask=inside, other=0.0)
        tl.store(out + j * size + cols, below, mask=inside)


# ------------------------------------------------------------------------------------------------ launchers

def _padded(tensors, like) -> tuple[list, list[int]]:
    """Four tensors and their rows: those of the past rounds, then `like` with none."""
    missing = SLOTS - len(tensors)
    return [*tensors, *[like] * missing], [*(len(t) for t in tensors), *[0] * missing]


def residual(x: Tensor, eps: Tensor, noise: Tensor | None, a: Tensor, b: Tensor, c: Tensor, past_r: list[Tensor],
             order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(R, squares, gram, rhs); see `triskele.ops.taa_residual`. All contiguous; at most 4 past rounds."""
    window, size, slots = len(a), x.shape[1], len(past_r)
    out = x.new_empty(window, size)
    if size == 0:
        return out, a.new_zeros(window), a.new_zeros(window, slots, slots), a.new_zeros(window, slots)
    squares, gram, rhs = a.new_empty(window), a.new_empty(window, slots, slots), a.new_empty(window, slots)
    tile = TAA_RESIDUAL[x.dtype.itemsize]
    programs, stats = triton.cdiv(size, tile.cols), 1 + slots + slots * (slots + 1) // 2
    shares = x.new_empty(window, stats, programs)
    full = order >= window
    pasts, lengths = _padded(past_r, x)
    residual_kernel[(programs,)](
        x, eps, x if noise is None else noise, a, b, c, *pasts, out, out if full else torch.empty_like(out), shares,
        size, window, len(eps), b.shape[1], order, programs, *lengths, NOISE=noise is not None, Q=slots, FULL=full,
        ROWS=tile.rows, COLS=tile.cols, maxnreg=TAA_RESIDUAL_REGISTERS, **tile.options)
    gather_kernel[(window, stats)](shares, squares, gram, rhs, programs, Q=slots, num_warps=4)
    return out, squares, gram, rhs


def gamma(squares: Tensor, gram: Tensor, rhs: Tensor, limits: Tensor, lengths: list[int], ridge: float,
          relative: bool) -> tuple[Tensor, Tensor]:
    """(γ [W, Q], highest [1]); see `triskele.ops.taa_gamma`. All contiguous; at most 4 past rounds."""
    window, slots = rhs.shape
    out, highest = torch.empty_like(rhs), rhs.new_empty(1, dtype=torch.int64)
    ridges = rhs.new_full((1,), ridge)  # a float64: a kernel's own argument would be rounded to float32
    gamma_kernel[(1,)](squares, gram, rhs, limits, out, highest, window, slots, *lengths, *[0] * (SLOTS - slots),
                       ridges, RELATIVE=relative, num_warps=4)
    return out, highest


def update(x: Tensor, r: Tensor, past_x: list[Tensor], past_r: list[Tensor], gamma: Tensor, eps: Tensor,
           enter_a: Tensor, enter_w: Tensor, enter_c: Tensor, enter_noise: Tensor | None) -> Tensor:
    """[g + W, N]; see `triskele.ops.taa_update`. All contiguous; at most 4 past rounds."""
    (window, size), count = r.shape, len(enter_a)
    out = x.new_empty(count + window, size)
    if size == 0:
        return out
    tile = TAA_UPDATE[x.dtype.itemsize]
    xs, lengths = _padded(past_x, x)
    rs, _ = _padded(past_r, x)
    update_kernel[(triton.cdiv(window, tile.rows) * triton.cdiv(size, tile.cols),)](
        x, r, *xs, *rs, gamma, out[count:], size, window, *lengths, Q=len(past_r), ROWS=tile.rows, COLS=tile.cols,
        **tile.options)
    if count:
        enter_kernel[(triton.cdiv(size, tile.cols),)](
            eps, enter_a, enter_w, enter_c, x if enter_noise is None else enter_noise, out, size, count, len(eps),
            NOISE=enter_noise is not None, COLS=tile.cols, STEP=32, **tile.options)
    return out
