"""The triangular system of a sampler: x_i = a[i] x_{i+1} + Σ_d b[i, d] ε_{i+1+d} + c[i] noise[i], i = T-1 … 0."""

from __future__ import annotations

from collections.abc import Callable

import torch

from triskele.checks import check_tensor, expected


class TriangularSystem:
    """x_i = a[i] x_{i+1} + Σ_d b[i, d] ε_{i+1+d} + c[i] noise[i], i = T-1 … 0, with x_T = noise[T].

    ε_j = denoiser(input_scale[j-1] · x_j, timesteps[j-1]) is evaluated at state j; state 0 is the sample. The noise is
    drawn once, so that a stochastic sampler is a fixed set of equations too.

    a, c         [T], any real dtype; kept as float64
    b            [T] (first order) or [T, p] (multistep, newest first: column d multiplies ε_{i+1+d}); weights of states
                 above T are zero
    timesteps    [T], as the model takes them; timesteps[i] belongs to ε_{i+1}
    init_scale   the scheduler's init_noise_sigma: the caller multiplies the noise of state T by it
    input_scale  [T] or None (ones): factor on the model's input (scale_model_input), input_scale[i] for state i+1

    Raises ValueError on wrong shapes and non-finite weights.
    """

    def __init__(self, a, b, c, timesteps, *, init_scale: float = 1.0, input_scale=None):
        self.a = _weights("a", a, dims=(1,))
        steps = self.a.shape[0]
        if steps == 0:
            raise expected("a", "at least one step", "none")
        self.b = _weights("b", b, dims=(1, 2), steps=steps)
        self.c = _weights("c", c, dims=(1,), steps=steps)
        self.timesteps = torch.as_tensor(timesteps).detach().cpu().clone()
        if self.timesteps.shape != (steps,):
            raise expected("timesteps", f"shape [{steps}]", list(self.timesteps.shape))
        if self.timesteps.is_floating_point() and not self.timesteps.isfinite().all():
            raise expected("timesteps", "finite values", "a NaN or infinity")
        ones = torch.ones(steps, dtype=torch.float64)
        self.input_scale = ones if input_scale is None else _weights("input_scale", input_scale, dims=(1,), steps=steps)
        self.init_scale = float(init_scale)
        band = self.band
        if band.shape[1] == 0 or band.shape[1] > steps:
            raise expected("b", f"1 to {steps} columns", band.shape[1])
        above = torch.arange(steps)[:, None] + 1 + torch.arange(band.shape[1]) > steps
        if band[above].any():
            raise expected("b", "zero weights for states above T", "a non-zero one")

    @property
    def num_steps(self) -> int:
        """T, the number of denoiser calls of the sequential sampler."""
        return self.a.shape[0]

    @property
    def band(self) -> torch.Tensor:
        """b as [T, p]."""
        return self.b if self.b.dim() == 2 else self.b[:, None]

    def __repr__(self) -> str:
        kind = "stochastic" if self.c.any() else "deterministic"
        return f"TriangularSystem({self.num_steps} steps, {self.band.shape[1]} evaluations a step, {kind})"

    @classmethod
    def from_scheduler(cls, scheduler, num_steps: int | None = None, eta: float = 0.0, **set_timesteps):
        """The system of a diffusers scheduler, its weights taken by probing `step()` (see `probe.py`).

        scheduler      any diffusers scheduler whose step is linear in the sample, the model outputs and the noise; a
                       deep copy is probed, the object itself is left alone
        num_steps      for `set_timesteps`; None: the timesteps already set (from `begin_index` on)
        eta            DDIM's share of noise; a scheduler without the argument takes 0 (and 1 where it draws noise)
        set_timesteps  further arguments for `scheduler.set_timesteps` (sigmas=, mu=)

        A multi-call sampler (PNDM's warm-up, Heun) gives one state a model call: T is the number of calls. The
        denoiser's output is whatever `step()` takes: noise, velocity, sample or flow.

        Raises ValueError, with the reason, where the step cannot be made triangular.
        """
        from triskele.sampling.probe import probe

        return cls(**probe(scheduler, num_steps, eta, set_timesteps))

    def sequential(self, denoiser: Callable, noise: torch.Tensor) -> torch.Tensor:
        """The trajectory [T+1, *latent] computed one denoiser call after the other; state 0 is the sample.

        denoiser  (x [1, *latent], timestep [1]) -> [1, *latent]
        noise     [T+1, *latent], float32 or float64
        """
        check_noise(noise, self.num_steps)
        out, eps = torch.empty_like(noise), {}
        out[-1] = noise[-1]
        band = self.band
        with torch.no_grad():
            for i in reversed(range(self.num_steps)):
                timestep = self.timesteps[i:i + 1].to(noise.device)
                eps[i + 1] = denoiser(out[i + 1:i + 2] * float(self.input_scale[i]), timestep)[0].to(noise.dtype)
                out[i] = float(self.a[i]) * out[i + 1]
                for d in band[i].nonzero()[:, 0].tolist():
                    out[i] += float(band[i, d]) * eps[i + 1 + d]
                if self.c[i] != 0:
                    out[i] += float(self.c[i]) * noise[i]
        return out


def check_noise(noise, steps: int, name: str = "noise") -> None:
    """[T+1, *latent], float32 or float64."""
    check_tensor(name, noise, floating=True)
    if noise.dtype not in (torch.float32, torch.float64):
        raise expected(name, "float32 or float64", noise.dtype)
    if noise.dim() < 1 or noise.shape[0] != steps + 1:
        raise expected(name, f"shape [{steps + 1}, *latent]", list(noise.shape))


def _weights(name: str, value, *, dims, steps: int | None = None) -> torch.Tensor:
    value = torch.as_tensor(value)
    if value.is_complex():
        raise expected(name, "a real dtype", value.dtype)
    value = value.detach().to(device="cpu", dtype=torch.float64).clone()
    if value.dim() not in dims or (steps is not None and value.shape[0] != steps):
        size = "T" if steps is None else str(steps)
        raise expected(name, "shape " + " or ".join(f"[{size}{', p' * (d - 1)}]" for d in dims), list(value.shape))
    if not value.isfinite().all():
        raise expected(name, "finite values", "a NaN or infinity")
    return value
