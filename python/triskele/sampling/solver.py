"""Solves a triangular system by fixed-point iteration with triangular Anderson acceleration, a window at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from triskele.checks import check_choice, check_int, expected
from triskele.ops.taa import api as step
from triskele.sampling import predictor as predictors
from triskele.sampling.system import TriangularSystem, check_noise


class NonFiniteError(ValueError, FloatingPointError):
    """The denoiser gave a NaN or infinity; the message names the round, the state and the timestep."""


@dataclass(frozen=True)
class Result:
    """What `solve` returns.

    samples     [T+1, *latent]: the trajectory; state 0 is the sample
    iterations  rounds: batched denoiser calls
    nfe         rows evaluated in all of them
    residuals   [iterations, T] float64: RMS of each row's first-order residual before the round's update; NaN outside
                the window
    finished    [iterations + 1] int64: all states from this one up were final, before the first round and after each
    converged   False when `max_iterations` ended it
    """

    samples: torch.Tensor
    iterations: int
    nfe: int
    residuals: torch.Tensor
    finished: torch.Tensor
    converged: bool


class Solver:
    """One sample's iteration, taken round by round; `solve` is the loop over it.

        solver = Solver(system, noise, window=8)
        while not solver.done:
            x, timesteps = solver.rows()
            solver.update(denoiser(x, timesteps))
        result = solver.result()

    One Solver a sample is the rule: convergence is judged, and windows move, for each sample by itself. Several
    samples share a denoiser call by concatenating their `rows()`. (A batch axis inside the latent works as well, but
    then all of it moves at the pace of one RMS over the whole batch.) Arguments as in `solve`.
    """

    def __init__(self, system: TriangularSystem, noise: torch.Tensor, *, window: int | None = None,
                 order: int | None = None, memory: int = 2, tolerance: float | torch.Tensor = 1e-3,
                 criterion: str = "step", ridge: float = 1e-3, ridge_mode: str = "relative",
                 init: torch.Tensor | None = None, start: int | None = None, predictor: str | None = "velocity",
                 max_iterations: int | None = None, backend: str = "auto"):
        if not isinstance(system, TriangularSystem):
            raise expected("system", "a TriangularSystem", type(system).__name__)
        steps = system.num_steps
        check_noise(noise, steps)
        check_choice("criterion", criterion, ("step", "rms"))
        check_choice("ridge_mode", ridge_mode, ("relative", "absolute"))
        check_choice("predictor", predictor, predictors.NAMES)
        for name, value in (("window", window), ("order", order), ("max_iterations", max_iterations)):
            if value is not None:
                check_int(name, value, low=1)
        check_int("memory", memory, low=1)
        if not ridge >= 0:
            raise expected("ridge", "a number >= 0", ridge)
        if init is not None:
            check_noise(init, steps, "init")
            if init.shape != noise.shape or init.device != noise.device:
                raise expected("init", f"the shape and device of noise ({list(noise.shape)}, {noise.device})",
                               f"{list(init.shape)}, {init.device}")
        if start is not None:
            check_int("start", start, low=1, high=steps)
            if init is None and start != steps:
                raise expected("init", f"a trajectory that holds states {start} … {steps}", None)

        self.system, self._latent, self._device = system, noise.shape[1:], noise.device
        self._dtype, self._steps, self._backend = noise.dtype, steps, backend
        self._window = min(window or steps, steps)
        self._order, self._memory = order or self._window, memory
        self._ridge, self._relative = float(ridge), ridge_mode == "relative"
        self._predictor, self._max = predictor, max_iterations
        self._tolerance = _row_tolerance(tolerance, criterion, system)
        self._on_device = tuple(w.to(self._device) for w in (system.a, system.band, system.c, self._tolerance))
        self._noise = noise.detach().reshape(steps + 1, math.prod(self._latent))
        self._init = None if init is None else init.detach().to(self._dtype).reshape(self._noise.shape)

        self._samples = torch.empty_like(self._noise)
        self._finished = steps if start is None else start
        if start is not None and init is not None:
            self._samples[start:] = self._init[start:]
        else:
            self._samples[steps] = self._noise[steps]
        self._eps_above = None if system.band.shape[1] == 1 else self._samples.new_empty(0, self._samples.shape[1])
        self._missing_above = 0 if self._eps_above is None else \
            min(system.band.shape[1] - 1, steps - self._finished)   # ε of given states, for the first round
        self._past: list[tuple[int, torch.Tensor, torch.Tensor]] = []   # newest first: (lowest state, X, R)
        self._x = self._first_window()                                 # states low … finished
        self._nfe, self._residuals, self._history = 0, [], [self._finished]

    @property
    def finished(self) -> int:
        """All states from this one up are final."""
        return self._finished

    @property
    def iterations(self) -> int:
        return len(self._residuals)

    @property
    def done(self) -> bool:
        return self._finished == 0 or (self._max is not None and self.iterations >= self._max)

    @property
    def estimate(self) -> torch.Tensor:
        """[*latent]: the lowest state that the window has reached; once finished, the sample."""
        return self._x[0].reshape(self._latent)

    @property
    def _low(self) -> int:
        """The lowest target of the window."""
        return max(self._finished - self._window, 0)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The denoiser's next batch: x [W, *latent], times the system's input scale, and timesteps [W]."""
        if self.done:
            raise RuntimeError("rows: the iteration is done")
        states = self._x[1:]
        if self._missing_above:
            states = torch.cat([states, self._samples[self._finished + 1:self._finished + 1 + self._missing_above]])
        index = slice(self._low, self._low + len(states))
        scale = self.system.input_scale[index]
        if (scale != 1).any():
            states = states * scale.to(states.device, states.dtype)[:, None]
        else:
            states = states.clone()        # the denoiser's to write on
        return states.reshape(len(states), *self._latent), self.system.timesteps[index].to(self._device)

    def update(self, eps: torch.Tensor) -> None:
        """Take the denoiser's output [W, *latent] for `rows()` and move every row of the window."""
        if self.done:
            raise RuntimeError("update: the iteration is done")
        eps = self._taken(eps)
        low, top = self._low, self._finished
        window = top - low
        if self._eps_above is not None:
            eps = torch.cat([eps.to(self._dtype), self._eps_above])
        x, weights = self._x, self._weights(low, top)
        past = [(old_x[:top - first], old_r[:top - first]) for first, old_x, old_r in self._past if first < top]
        past_x, past_r = [p[0] for p in past], [p[1] for p in past]

        r, squares, gram, rhs = step.taa_residual(
            x, eps, *weights[:3], noise=weights[3], past_r=past_r, order=self._order, backend=self._backend)
        size = max(x.shape[1], 1)
        gamma, highest = step.taa_gamma(
            squares, gram, rhs, self._on_device[3][low:top] ** 2 * size, [len(p) for p in past_r],
            ridge=self._ridge, relative=self._relative, backend=self._backend)
        *sums, highest = torch.cat([squares, highest.double()]).tolist()   # the round's one transfer
        highest = int(highest)
        self._record(low, top, sums, size, eps)
        finished = low + highest
        last = self._max is not None and self.iterations >= self._max
        count = low if last else low - max(finished - self._window, 0)   # the last round guesses all that is left
        fresh = self._fresh(window, past_r, highest)
        moved = step.taa_update(x[fresh:], r[fresh:], gamma[fresh:], eps, past_x=past_x, past_r=past_r,
                                enter=self._enter(low, count, fresh, len(eps)), backend=self._backend)

        base = low - count                                   # state of moved[0]
        self._samples[finished:top] = moved[finished - base:]
        self._past = [(low, x[:-1], r), *self._past][:self._memory - 1]
        self._x = moved[:finished - base + 1]
        if self._eps_above is not None:
            depth = self.system.band.shape[1] - 1
            self._eps_above = eps[finished - low:][:depth]   # ε row j is state low + 1 + j
        self._nfe += window + self._missing_above
        self._missing_above = 0
        self._finished = finished
        self._history.append(finished)

    def result(self) -> Result:
        """The trajectory so far; states below the window are guesses when `max_iterations` ended it."""
        samples = self._samples.clone()
        low = self._finished - (len(self._x) - 1)
        samples[low:self._finished] = self._x[:-1]
        if low > 0:                        # asked for in the middle of the iteration
            samples[:low] = samples[low] if self._init is None else self._init[:low]
        rounds = [torch.zeros(0, self._steps, dtype=torch.float64), *(row[None] for row in self._residuals)]
        return Result(samples.reshape(len(samples), *self._latent), self.iterations, self._nfe, torch.cat(rounds),
                      torch.tensor(self._history), self._finished == 0)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _first_window(self) -> torch.Tensor:
        low, top = self._low, self._finished
        if self._init is not None:
            return torch.cat([self._init[low:top], self._samples[top:top + 1]])
        return self._samples[top:top + 1].expand(top - low + 1, -1).contiguous()

    def _weights(self, low: int, top: int):
        noisy = bool(self.system.c[low:top].any())
        return *(w[low:top] for w in self._on_device[:3]), self._noise[low:top] if noisy else None

    def _fresh(self, window: int, past_r, highest: int) -> int:
        """How many of the lowest rows follow the row above them rather than the anchor.

        Rows without a round behind them take no Anderson step; the accelerated row above them would leave them behind,
        a jump that costs a round. With the velocity predictor they are continued from it, as entering rows are.
        """
        if self._predictor != "velocity" or self._init is not None or not past_r:
            return 0
        fresh = window - len(past_r[0])
        return fresh if fresh < highest else 0

    def _enter(self, low: int, count: int, fresh: int, eps_rows: int):
        if self._init is not None:
            a, c = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
            w, noise = torch.zeros(count, eps_rows, dtype=torch.float64), self._init[low - count:low]
        else:
            a, w, c = predictors.entering(self._predictor, self.system, low, count, eps_rows, fresh)
            noise = self._noise[low - count:low + fresh] if c.any() else None
        return a.to(self._device), w.to(self._device), c.to(self._device), noise

    def _taken(self, eps) -> torch.Tensor:
        rows = self._finished - self._low + self._missing_above
        shape = (rows, *self._latent)
        if not isinstance(eps, torch.Tensor) or eps.shape != shape:
            got = list(eps.shape) if isinstance(eps, torch.Tensor) else type(eps).__name__
            raise expected("denoiser output", f"shape {list(shape)}", got)
        if not eps.is_floating_point():
            raise expected("denoiser output", "a floating dtype", eps.dtype)
        if eps.device != self._device:
            raise expected("denoiser output", f"the device of noise ({self._device})", eps.device)
        eps = eps.detach().reshape(rows, self._samples.shape[1])
        return eps if eps.dtype in (self._dtype, torch.bfloat16) else eps.to(self._dtype)

    def _record(self, low: int, top: int, squares: list[float], size: int, eps) -> None:
        row = torch.full((self._steps,), float("nan"), dtype=torch.float64)
        row[low:top] = (torch.tensor(squares, dtype=torch.float64) / size).sqrt()
        if not row[low:top].isfinite().all():
            self._refuse_non_finite(low, eps)
        self._residuals.append(row)

    def _refuse_non_finite(self, low: int, eps) -> None:
        where = f"at round {self.iterations + 1}"
        for j in reversed(range(len(eps))):
            if not eps[j].isfinite().all():
                raise NonFiniteError("denoiser output: expected finite values, got a NaN or infinity "
                                     f"{where}, timestep {self.system.timesteps[low + j].item()} (state {low + 1 + j})")
        raise NonFiniteError(f"residual: expected finite values, got an overflow {where} in states {low} … "
                             f"{self._finished - 1}, though the denoiser's output is finite")


def solve(denoiser: Callable, system: TriangularSystem, noise: torch.Tensor, window: int | None = None,
          order: int | None = None, memory: int = 2, tolerance: float | torch.Tensor = 1e-3, criterion: str = "step",
          ridge: float = 1e-3, ridge_mode: str = "relative", init: torch.Tensor | None = None, start: int | None = None,
          predictor: str | None = "velocity", max_iterations: int | None = None, backend: str = "auto") -> Result:
    """x_i ← x_i + R_i - (ΔX_i + ΔR_i) γ_i, γ_i = (Σ_{j>=i} ΔR_jᵀ ΔR_j + λI)^{-1} Σ_{j>=i} ΔR_jᵀ R_j, a window a round.

    R is the residual of the system's equations unrolled to `order`; ΔX, ΔR are the differences of the last `memory`
    rounds, of which a row uses those it was in the window for. The highest unconverged row, and those above it, take
    the plain step x ← x + R and are final then: at least one row a round, at most T rounds, and the sequential
    trajectory.

    denoiser        (x [W, *latent] in the state's dtype, times the system's input scale; timesteps [W]) ->
                    [W, *latent]; W <= window (in the first round of a multistep system with `start`, the states that
                    its equations look back at come on top)
    system          TriangularSystem of T steps
    noise           [T+1, *latent], float32 or float64, which is the state's dtype; noise[T] is x_T
    window          rows a round; None: T
    order           of the unrolled equations; None: the window
    memory          rounds that the Anderson step looks at, its own included; 1: plain fixed point
    tolerance       a number, or [T], one a row; it bounds a step, not the error of the sample
    criterion       "step": RMS of row i's first-order residual <= tolerance · Σ_d |b[i, d]|, in units of ε; "rms":
                    <= tolerance, the published test
    ridge           λ: "relative", times the mean diagonal of the row's summed Gram matrix; "absolute", as published
    init            [T+1, *latent], a trajectory to start from; rows below the window come from it
    start           n: states n … T are given by `init` and final; None: noise[T] alone is
    predictor       guess of a row that enters the window: "velocity" (the sampler's equation, ε continued along a
                    line) or "copy" (of its neighbour, as published; None is the same)
    max_iterations  rounds; reached: returned with converged=False, the states left being guesses
    backend         of the step's kernels: "auto", "cuda", "triton", "cpu", "reference"

    Returns `Result`. Raises ValueError on bad arguments and on a denoiser output of the wrong shape, dtype or device;
    NonFiniteError (a ValueError and a FloatingPointError), naming round and timestep, on a NaN or infinity from the
    denoiser. Source: arXiv 2402.09970, with the differences listed in docs/sampling.md.
    """
    solver = Solver(system, noise, window=window, order=order, memory=memory, tolerance=tolerance, criterion=criterion,
                    ridge=ridge, ridge_mode=ridge_mode, init=init, start=start, predictor=predictor,
                    max_iterations=max_iterations, backend=backend)
    with torch.no_grad():
        while not solver.done:
            solver.update(denoiser(*solver.rows()))
    return solver.result()


def _row_tolerance(tolerance, criterion: str, system: TriangularSystem) -> torch.Tensor:
    """The RMS under which each row counts as converged, [T] float64."""
    rows = torch.as_tensor(tolerance, dtype=torch.float64).detach().cpu()
    if rows.dim() > 1 or (rows.dim() == 1 and len(rows) != system.num_steps):
        raise expected("tolerance", f"a number or a tensor of shape [{system.num_steps}]", list(rows.shape))
    if not (rows.isfinite().all() and (rows >= 0).all()):
        raise expected("tolerance", "finite numbers >= 0", tolerance)
    rows = rows.expand(system.num_steps)
    return rows * system.band.abs().sum(1) if criterion == "step" else rows.clone()
