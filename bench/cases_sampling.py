"""The solver's step over its window, and adaLN with a row of scale and shift a timestep."""

from __future__ import annotations

import peers_taa
import torch
import torch.nn.functional as F
from case import B16, F32, SETS, Calls, Case, dtype_name, set_up, thread_scaling
from timing import rotating

import triskele as tk

EPS = 1e-6  # of the layer norm


def taa_step(steps, latent, *, target=None, curves=(), label=""):
    """One round of ParaTAA over a window of all steps, memory 2: residual, solve and update.

    The floor is one read of x, ε and the past round, one write of R, and a second pass: nine arrays of W x N.
    """

    def make(device):
        size = torch.Size(latent).numel()
        generator = torch.Generator().manual_seed(0)
        rows = torch.linspace(0.99, 0.999, steps, dtype=torch.float64, device=device)
        a, b, c = rows, (0.05 * rows)[:, None].contiguous(), torch.zeros_like(rows)
        limits = torch.full((steps,), 1e-3**2 * size, dtype=torch.float64, device=device)

        def states(count):
            return torch.randn(count, size, generator=generator).to(device)

        inputs = [(states(steps + 1), states(steps), states(steps), states(steps)) for _ in range(SETS)]

        def step(x, eps, past_x, past_r):
            r, squares, gram, rhs = tk.ops.taa_residual(x, eps, a, b, c, past_r=[past_r])
            gamma, _ = tk.ops.taa_gamma(squares, gram, rhs, limits, [steps])
            return tk.ops.taa_update(x, r, gamma, eps, past_x=[past_x], past_r=[past_r])

        traffic = 9 * steps * size * 4
        copies = [(torch.randn(traffic // 8, device=device), torch.empty(traffic // 8, device=device))
                  for _ in range(SETS)]
        peers = {"copy of as many bytes": rotating(lambda source, to: to.copy_(source), copies),
                 "published step in torch": rotating(peers_taa.published_step(a, b[:, 0], c), inputs)}
        return Calls(rotating(step, inputs), peers, {}, 40 * steps * size, traffic, "float32")

    shape = "x".join(map(str, latent))
    targets = {"published step in torch": target, "copy of as many bytes": 0.5} if target else {}
    return Case(f"taa_step float32 T{steps} {shape}", "taa_step", make, targets, dict(curves), label)


def _modulation(dtype, batch, tokens, channels, device):
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, y = ([values(batch, tokens, channels) for _ in range(SETS)] for _ in range(2))
    rows = torch.arange(batch, device=device)
    return x, y, values(batch, channels), values(batch, channels), rows


def adaln_modulate(dtype, batch, tokens, channels):
    """norm(x) (1 + scale[row]) + shift[row]: one read and one write of x."""

    def make(device):
        x, _, scale, shift, rows = _modulation(dtype, batch, tokens, channels, device)
        inputs = [(one,) for one in x]

        def torch_way(x):
            normed = F.layer_norm(x, (channels,), eps=EPS)
            return normed * (1 + scale[rows][:, None]) + shift[rows][:, None]

        return Calls(rotating(lambda x: tk.ops.adaln_modulate(x, scale, shift, rows), inputs),
                     *_eager_and_compiled(torch_way, inputs), 8 * x[0].numel(),
                     2 * x[0].numel() * dtype.itemsize, "float32")

    name = f"adaln_modulate {dtype_name(dtype)} B{batch} L{tokens} C{channels}"
    return Case(name, "adaln", make, {"torch eager": 1.0},
                label=f"adaLN modulate, {dtype_name(dtype)}" if dtype is B16 else "")


def gate_residual(dtype, batch, tokens, channels):
    """residual + gate[row] x: two reads and a write."""

    def make(device):
        x, residual, gate, _, rows = _modulation(dtype, batch, tokens, channels, device)
        inputs = list(zip(residual, x))
        return Calls(rotating(lambda residual, x: tk.ops.gate_residual(residual, x, gate, rows), inputs),
                     *_eager_and_compiled(lambda residual, x: residual + x * gate[rows][:, None], inputs),
                     2 * x[0].numel(), 3 * x[0].numel() * dtype.itemsize, "float32")

    return Case(f"gate_residual {dtype_name(dtype)} B{batch} L{tokens} C{channels}", "adaln", make,
                {"torch eager": 1.0})


def _eager_and_compiled(function, inputs):
    """(calls, absent)."""
    torch._dynamo.reset()
    calls, absent = {"torch eager": rotating(function, inputs)}, {}
    set_up("torch.compile", lambda: rotating(torch.compile(function), inputs), calls, absent)
    return calls, absent


def short() -> list[Case]:
    found = [taa_step(100, (4, 64, 64), target=10.0, curves={"latent elements": 4 * 64 * 64},
                      label="TAA step, T = 100, 4×64×64 latents"),
             thread_scaling(taa_step(100, (4, 64, 64)))]
    if hasattr(tk.ops, "adaln_modulate"):
        found += [case(dtype, 8, 512, 1536) for case in (adaln_modulate, gate_residual) for dtype in (F32, B16)]
    return found


def curves() -> list[Case]:
    return [taa_step(100, (4, side, side), curves={"latent elements": 4 * side * side}) for side in (16, 32, 128)]
