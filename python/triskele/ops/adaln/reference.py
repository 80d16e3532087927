"""Layer norm, modulation and gate in plain torch, float64: the formulas, and the truth for every kernel."""

from __future__ import annotations


def _of_samples(rows, index, batch: int):
    """[B, 1, C]: each sample's row of [R, C]."""
    rows = rows.double()
    return (rows.expand(batch, -1) if index is None else rows[index])[:, None]


def _normed(x, eps: float):
    """(z, 1 / sqrt(var + eps)), z with mean 0 and variance 1 over the channels."""
    x = x.double().contiguous()
    centered = x - x.mean(2, keepdim=True)
    inverse = (centered.square().mean(2, keepdim=True) + eps).rsqrt()
    return centered * inverse, inverse


def modulate(x, scale, shift, row_index, weight, bias, eps: float):
    """See `triskele.ops.adaln_modulate`."""
    z, _ = _normed(x, eps)
    z = z if weight is None else z * weight.double()
    z = z if bias is None else z + bias.double()
    batch = x.shape[0]
    return (z * (1 + _of_samples(scale, row_index, batch)) + _of_samples(shift, row_index, batch)).to(x.dtype)


def gate(residual, x, gate, row_index):
    """See `triskele.ops.gate_residual`."""
    return (residual.double().contiguous() + _of_samples(gate, row_index, x.shape[0]) * x.double()).to(residual.dtype)


def _to_rows(values, like, index):
    """[B, C] summed into the rows [R, C] that the samples took, in the dtype of `like`."""
    out = values.new_zeros(like.shape)
    if index is None:
        return (out + (values.sum(0) if like.shape[0] == 1 else values)).to(like.dtype)
    return out.index_add(0, index, values).to(like.dtype)


def modulate_backward(grad, x, scale, row_index, weight, bias, eps: float):
    """(dx, dscale, dshift, dweight, dbias): with z the normalised x and u = dy (1 + s) w,
    dx = (u - mean(u) - z mean(u z)) / sqrt(var + eps)."""
    z, inverse = _normed(x, eps)
    grad = grad.double().contiguous()
    gain = 1 + _of_samples(scale, row_index, x.shape[0])
    normed = z if weight is None else z * weight.double()                  # what scale multiplies
    normed = normed if bias is None else normed + bias.double()
    d_normed = grad * gain
    u = d_normed if weight is None else d_normed * weight.double()
    dx = (u - u.mean(2, keepdim=True) - z * (u * z).mean(2, keepdim=True)) * inverse
    none = x.new_empty(0)
    return (dx.to(x.dtype), _to_rows((grad * normed).sum(1), scale, row_index), _to_rows(grad.sum(1), scale, row_index),
            none if weight is None else (d_normed * z).sum((0, 1)).to(weight.dtype),
            none.clone() if bias is None else d_normed.sum((0, 1)).to(bias.dtype))


def gate_backward(grad, x, gate, row_index):
    """(dx, dgate) = (gate dy, Σ over the tokens of x dy)."""
    grad = grad.double().contiguous()
    dx = grad * _of_samples(gate, row_index, x.shape[0])
    return dx.to(x.dtype), _to_rows((grad * x.double()).sum(1), gate, row_index)
