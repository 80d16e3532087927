"""triskele::taa_residual, triskele::taa_gamma, triskele::taa_update: custom ops with fake kernels.

No autograd: a solver step is not differentiated through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triskele.backend import select
from triskele.ops.taa import backends  # noqa: F401  registers the tables


@torch.library.custom_op("triskele::taa_residual", mutates_args=())
def taa_residual(x: torch.Tensor, eps: torch.Tensor, noise: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
                 c: torch.Tensor, past_r: Sequence[torch.Tensor], order: int,
                 backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, eps, a, b, c = (tensor.contiguous() for tensor in (x, eps, a, b, c))
    noise = None if noise is None else noise.contiguous()
    inputs = (x, eps, noise, a, b, c, [r.contiguous() for r in past_r], order)
    return tuple(select("taa.residual", *inputs, backend=backend).run(*inputs))


@taa_residual.register_fake
def _(x, eps, noise, a, b, c, past_r, order, backend):
    window, slots = a.shape[0], len(past_r)
    return (x.new_empty(window, x.shape[1]), a.new_empty(window), a.new_empty(window, slots, slots),
            a.new_empty(window, slots))


@torch.library.custom_op("triskele::taa_gamma", mutates_args=())
def taa_gamma(squares: torch.Tensor, gram: torch.Tensor, rhs: torch.Tensor, limits: torch.Tensor,
              lengths: Sequence[int], ridge: float, relative: bool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = (squares.contiguous(), gram.contiguous(), rhs.contiguous(), limits.contiguous(), list(lengths), ridge,
              relative)
    return tuple(select("taa.gamma", *inputs, backend=backend).run(*inputs))


@taa_gamma.register_fake
def _(squares, gram, rhs, limits, lengths, ridge, relative, backend):
    return torch.empty_like(rhs), rhs.new_empty(1, dtype=torch.int64)


@torch.library.custom_op("triskele::taa_update", mutates_args=())
def taa_update(x: torch.Tensor, residual: torch.Tensor, past_x: Sequence[torch.Tensor],
               past_r: Sequence[torch.Tensor], gamma: torch.Tensor, eps: torch.Tensor, enter_a: torch.Tensor,
               enter_w: torch.Tensor, enter_c: torch.Tensor, enter_noise: torch.Tensor | None,
               backend: str) -> torch.Tensor:
    x, residual, gamma, eps = (tensor.contiguous() for tensor in (x, residual, gamma, eps))
    enter_a, enter_w, enter_c = (tensor.contiguous() for tensor in (enter_a, enter_w, enter_c))
    inputs = (x, residual, [p.contiguous() for p in past_x], [p.contiguous() for p in past_r], gamma, eps, enter_a,
              enter_w, enter_c, None if enter_noise is None else enter_noise.contiguous())
    return select("taa.update", *inputs, backend=backend).run(*inputs)


@taa_update.register_fake
def _(x, residual, past_x, past_r, gamma, eps, enter_a, enter_w, enter_c, enter_noise, backend):
    return x.new_empty(enter_a.shape[0] + residual.shape[0], x.shape[1])
