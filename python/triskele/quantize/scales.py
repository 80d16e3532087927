"""Integer group scales of int4 weights: all scales of an output channel are small multiples of one float.

    s[n, g] = t[n] q[n, g],   q an integer in 1 … 18,   t[n] in {4, 5, 6, 7} 2^e

so that code * q stays within ±126: a whole channel is one row of int8 with one scale, and a kernel multiplies integers
over all of K. t * q has seven significant bits at most: s is exact in bfloat16 and float16, and nothing else is stored.
After the two-level scales of QServe (arXiv 2405.04532).

Which q: the smallest squared error |r - Q|^2 alone would clip every group a little, and what is clipped has r's sign in
all channels of all layers. <r, r - Q> is lost to each layer's gain, and such losses add up as amplitudes, where errors
of random sign add up as squares. So a channel pays for both:

    |r|^2 |r - Q|^2 + 32 <r, r - Q>^2,   the smallest over t and over prices p, q chosen by |r - Q|^2 + p <r, r - Q>
"""

from __future__ import annotations

import torch

SCALES = ("amax", "integer")
LARGEST_CODE = 7
LARGEST_MULTIPLE = 18     # 7 * 18 = 126 <= 127
STEPS_OF_T = 2            # the smallest t that clips nothing, and the next smaller one
PRICES = tuple(i / 16 for i in (0, 1, 2, 3, 4, 6, 8))  # of what is lost, tried for each channel
COHERENCE = 32            # about as many linears as a signal passes in a model
_CHUNK = 2**17            # elements a pass of the search, so that its passes stay in the cache


def _rungs(t: torch.Tensor) -> torch.Tensor:
    """t > 0 -> the least i with t <= rung i; rungs are (4 + i mod 4) 2^(i div 4)."""
    fraction, exponent = torch.frexp(t)  # t = fraction 2^exponent, fraction in [1/2, 1)
    return (fraction * 8).ceil().int() - 4 + 4 * (exponent - 3)


def _rung(i: torch.Tensor) -> torch.Tensor:
    exponent = i.div(4, rounding_mode="floor")
    return (4 + i.remainder(4)) * ((exponent + 127) << 23).view(torch.float32)  # 2^exponent; pow may be off by a bit


def _lowest_rung(dtype: torch.dtype) -> int:
    """float16 keeps small scales as multiples of 2^-24; the others do not need their subnormal numbers."""
    return 4 * (-24 if dtype == torch.float16 else -120)


def _sums(grouped: torch.Tensor, counted: torch.Tensor, scales: torch.Tensor, importance) -> tuple:
    """(<r, Q>, <Q, Q>) of each group [N, G], Q its value with these scales; `counted` is r times `importance`."""
    codes = (grouped * scales.reciprocal()[..., None]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    products = (codes * counted).sum(-1) * scales
    squares = codes.square_() if importance is None else codes.square_().mul_(importance)
    return products, squares.sum(-1) * scales.square()


def _search(grouped: torch.Tensor, importance: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    need = grouped.abs().amax(-1) / LARGEST_CODE  # [N, G]: what clips nothing
    top = need.amax(1)
    first = _rungs(torch.where(top == 0, torch.ones_like(top), top / LARGEST_MULTIPLE))
    counted = grouped if importance is None else grouped * importance
    energy = (grouped * counted).sum(-1)  # [N, G]
    total = energy.sum(1, keepdim=True)
    best = None
    for step in range(STEPS_OF_T):
        t = _rung((first - step).clamp(min=_lowest_rung(dtype)))[:, None]  # [N, 1]
        most = (torch.finfo(dtype).max / t).floor().clamp(1, LARGEST_MULTIPLE)
        exact = need / t
        found = []  # (error, lost, scales) of each candidate q
        for q in (exact.ceil(), exact.floor(), exact.floor() - 1):
            scales = torch.minimum(q.clamp(min=1), most) * t
            products, squares = _sums(grouped, counted, scales, importance)
            found.append((energy - 2 * products + squares, energy - products, scales))
        for price in PRICES:
            chosen = None
            for error, lost, scales in found:
                chosen = _least(chosen, (error + price * lost, error, lost, scales))
            _, error, lost, scales = chosen
            cost = error.sum(1, keepdim=True) * total + COHERENCE * lost.sum(1, keepdim=True).square()
            best = _least(best, (cost, scales))
    return best[1]


def _least(old: tuple | None, new: tuple) -> tuple:
    """Element by element, the one whose first entry is smaller; the old one among equals."""
    if old is None:
        return new
    less = new[0] < old[0]
    return tuple(torch.where(less, b, a) for a, b in zip(old, new))


def are_integer(scales: torch.Tensor) -> bool:
    """Whether the scales of each channel, [N, G] of any floating dtype, are multiples 1 … 18 of one number."""
    values = scales.double()
    if not bool(((values > 0) & torch.isfinite(values)).all()):
        return False
    fraction, exponent = torch.frexp(values)  # value = (fraction 2^53) 2^(exponent - 53), the first an integer
    exponent = exponent - exponent.amin(1, keepdim=True)
    if bool((exponent > LARGEST_MULTIPLE.bit_length()).any()):
        return False
    integers = (fraction * 2.0**53).long() << exponent  # 53 + 5 bits
    common = integers[:, 0]
    for column in integers.unbind(1)[1:]:
        common = torch.gcd(common, column)
    return bool((integers <= LARGEST_MULTIPLE * common[:, None]).all())


def integer_scales(grouped: torch.Tensor, dtype: torch.dtype, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scales [N, G] float32 of a weight [N, G, group] float32, exact in `dtype`.

    t[n] is the smallest that needs no clipping, or the next smaller one; q[n, g] above max|r| / (7 t[n]), below, or one
    further below. A zero group gets t[n].

    importance  [G, group]: what a square (and a product) counts in each column; None: the same in all
    """
    rows = max(1, _CHUNK // max(1, grouped[0].numel())) if len(grouped) else 1
    parts = [_search(part, importance, dtype) for part in grouped.split(rows)]
    return torch.cat(parts)
