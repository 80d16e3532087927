"""One parallel sampling, from the pipeline's first timestep to the last round."""

from __future__ import annotations

import copy
import inspect
import logging
import time
from dataclasses import dataclass, field

import torch

from triskele.checks import expected
from triskele.diffusers.pace import Pace, choose, too_slow
from triskele.diffusers.widen import Call
from triskele.sampling import Solver

logger = logging.getLogger("triskele")

HISTORY_ELEMENTS = 2**20
"""Latents larger than this are not kept round by round (`SampleRun.history`)."""


@dataclass
class SampleRun:
    """How the sampling of one sample of the batch went.

    window      rows a round
    iterations  rounds until it converged; nfe: rows evaluated, guidance's second evaluation not counted
    residuals   [iterations, T], as `triskele.sampling.Result` has them; converged: all rows reached the tolerance
    history     a dict a round: "round"; "residual", the window's largest before the round, in the tolerance's units;
                "sample", the window's lowest state after it, float32 (of the batch's first sample, up to 2^20 elements;
                else None)
    """

    window: int
    iterations: int
    nfe: int
    residuals: torch.Tensor
    converged: bool
    history: list = field(repr=False)


class Run:
    """The state of one loop over the stand-in's timesteps."""

    def __init__(self, sampling, scheduler):
        self.sampling, self.config = sampling, sampling.config
        self.scheduler = copy.deepcopy(scheduler)               # as set_timesteps left it, and no stand-in
        self.scheduler.__class__ = type(scheduler).__mro__[1]
        self.timesteps = self.scheduler.timesteps               # [T], in the loop's order
        self.steps = len(self.timesteps)
        self.window: int | None = None
        self.decided = self.steps < 2                           # nothing to do at once in a single step
        self.pace: Pace | None = None
        self.solvers: list[Solver] = []
        self.history: list[list[dict]] = []
        self.unit: torch.Tensor | None = None                   # [T], of the residuals in the history
        self.returned: torch.Tensor | None = None               # what step() gave the pipeline
        self.rows: tuple | None = None                          # this round's rows, the same for every call in it
        self.calls = 0                                          # denoiser calls in this round
        self.spent = 0.0                                        # seconds of this round that went into measuring
        self.measuring = False

    @property
    def parallel(self) -> bool:
        return self.window is not None

    @property
    def finished(self) -> bool:
        return bool(self.solvers) and all(solver.done for solver in self.solvers)

    # -- the pipeline's loop -------------------------------------------------------------------------------------

    def turns(self):
        """Timesteps for the pipeline's loop; they end when every solver is done."""
        durations, calls = [], 0
        for k in range(self.steps):
            if self.finished:
                break
            start, self.rows, self.calls, self.spent = time.perf_counter(), None, 0, 0.0
            highest = self.steps - max((solver.finished for solver in self.solvers), default=self.steps - k)
            yield self.timesteps[highest]
            durations.append(time.perf_counter() - start - self.spent)
            calls = max(calls, self.calls)
        if self.finished:
            self._hold_to_account(durations, calls)

    def settle_sequential(self) -> None:
        """A step was taken before the denoiser had been called: whatever loop this is, it is not ours."""
        self.decided = True

    # -- the denoiser's hook -------------------------------------------------------------------------------------

    def widen(self, module, args, kwargs):
        """(args, kwargs) of the widened call; None: as it is."""
        if self.measuring or (self.decided and not self.parallel):
            return None
        call = Call(self.sampling.adapter, module, args, kwargs)
        if not self.decided:
            call.check(self.timesteps[0])
            self._decide(call)
            if not self.parallel:
                return None
        if self.rows is None:
            self.rows = self._state_rows(call) if self.solvers else None
        self.calls += 1
        if self.pace.row_seconds is None and self.solvers and self.calls == 1 and not _compiles(call.module):
            self.pace.row_seconds = self._timed(call, 1)        # in the second round: warm, and once for this shape
        if not self.solvers:
            return (), self._first_rows(call, self.window)
        return (), call.widened(*self._tiled(call))

    def _decide(self, call: Call) -> None:
        """Choose the window."""
        self.decided = True
        window = self.config.window
        key = (call.name, tuple(call.latents.shape), call.latents.dtype, call.latents.device, self.steps)
        if key not in self.sampling.paces:
            if window == "auto":
                pace, line = choose(lambda rows: self._timed(call, rows), self.steps)
                logger.log(logging.INFO if pace.window else logging.WARNING, line)
            else:
                pace = Pace(min(window or self.steps, self.steps))
            self.sampling.paces[key] = pace
        self.pace = self.sampling.paces[key]
        self.window = self.pace.window

    def _timed(self, call: Call, window: int) -> float:
        """Seconds of a denoiser call with `window` rows a sample; warmed up where a new shape costs extra."""
        arguments = call.arguments if window == 1 else self._first_rows(call, window)
        device = call.latents.device
        begin, seconds = time.perf_counter(), 0.0
        self.measuring = True
        try:
            for _ in range(2 if device.type == "cuda" or _compiles(call.module) else 1):
                _wait_for(device)
                start = time.perf_counter()
                with torch.no_grad():
                    call.module(**arguments)
                _wait_for(device)
                seconds = time.perf_counter() - start
        finally:
            self.measuring = False
            self.spent += time.perf_counter() - begin
        return seconds

    def _first_rows(self, call: Call, window: int) -> dict:
        """Arguments of the first round: copies of the initial noise at the first timesteps, lowest state first."""
        system = self.sampling.system(self.scheduler, 0.0)      # eta changes neither timesteps nor scales
        latents, given = call.latents, self.sampling.unscaled
        if given is not None and given.shape == latents.shape:
            scale = system.input_scale[-window:].to(latents.device, torch.float32).repeat(call.batch)
            rows = given.repeat_interleave(window, dim=0)
            rows = rows * scale.reshape(-1, *[1] * (rows.dim() - 1))
        else:
            rows = latents.repeat_interleave(window, dim=0)
        timesteps = system.timesteps[-window:].to(latents.device).repeat(call.batch)
        return call.widened(rows, timesteps, [window] * call.batch)

    def _state_rows(self, call: Call):
        """This round's rows of all samples: (states, timesteps, how many each sample has)."""
        parts = {n: solver.rows() for n, solver in enumerate(self.solvers) if not solver.done}
        counts = [len(parts[n][1]) if n in parts else 0 for n in range(len(self.solvers))]
        return torch.cat([x for x, _ in parts.values()]), torch.cat([t for _, t in parts.values()]), counts

    def _tiled(self, call: Call):
        """The rows for a call in which guidance may have put copies of the samples one after the other."""
        states, timesteps, counts = self.rows
        copies, rest = divmod(call.batch, len(counts))
        if rest:
            raise expected(f"rows of {self.sampling.adapter.latent_kwarg}", f"a multiple of the {len(counts)} samples",
                           call.batch)
        return states.repeat(copies, *[1] * (states.dim() - 1)), timesteps.repeat(copies), counts * copies

    # -- the stand-in's step() -----------------------------------------------------------------------------------

    def step(self, values: dict) -> torch.Tensor:
        """Give every solver its rows of the denoiser's output. Returns latents as they came in."""
        output, sample = values.pop("model_output"), values.pop("sample")
        values.pop("timestep")
        if not self.solvers:
            self._start(output, sample, values)
        elif sample is not self.returned and not torch.equal(sample, self.returned):
            raise ValueError("ParaTAA: the latents changed between two rounds (a callback_on_step_end that replaces "
                             "them?); in parallel sampling callbacks can look at the latents but not change them")
        counts = [self.window] * len(self.solvers) if self.rows is None else self.rows[2]
        copies, rest = divmod(len(sample), len(self.solvers))
        if rest or len(output) != sum(counts) * copies:
            raise expected("model_output", f"{sum(counts) * copies} rows (the window's)", len(output))
        for solver, eps, history in zip(self.solvers, output[:sum(counts)].split(counts), self.history):
            if not solver.done:
                solver.update(eps if eps.dtype == torch.bfloat16 else eps.float())
                keep = history is self.history[0] and solver.estimate.numel() <= HISTORY_ELEMENTS
                history.append({"round": solver.iterations, "sample": solver.estimate.clone() if keep else None})
        latents = torch.stack([solver.estimate for solver in self.solvers]).to(sample.dtype)
        self.returned = latents.repeat(copies, *[1] * (latents.dim() - 1))
        return self.returned

    def _start(self, output: torch.Tensor, sample: torch.Tensor, options: dict) -> None:
        """Build the solvers. `sample`: the initial latents; DiT's pipeline passes them with guidance's copy."""
        eta = float(options.pop("eta", None) or 0.0)
        generator = options.pop("generator", None)
        defaults = inspect.signature(self.scheduler.step).parameters
        for name, value in options.items():
            default = defaults[name].default
            if value is not default and (isinstance(value, torch.Tensor) or value != default):
                raise expected(f"ParaTAA: {name} of step()", f"its default, {default!r}", repr(value))
        if output.shape[1:] != sample.shape[1:]:
            raise expected("model_output", f"the shape of a latent, {list(sample.shape[1:])}", list(output.shape[1:]))
        system = self.sampling.system(self.scheduler, eta)
        noise = self._noise(system, output, sample, {"eta": eta, "generator": generator})
        half = len(sample) // 2
        if self.sampling.adapter.guidance_in_step and half and torch.equal(sample[:half], sample[half:]) \
                and torch.equal(*output.chunk(2)):
            noise = noise[:half]
        config = self.config
        self.solvers = [
            Solver(system, noise[n], window=self.window, order=config.order, memory=config.memory,
                   tolerance=config.tolerance, criterion=config.criterion, ridge=config.ridge,
                   ridge_mode=config.ridge_mode, predictor=config.predictor, max_iterations=config.max_iterations,
                   backend=config.backend)
            for n in range(len(noise))]
        self.history = [[] for _ in self.solvers]
        self.unit = system.band.abs().sum(1)
        if config.criterion == "rms":
            self.unit = torch.ones_like(self.unit)

    def _noise(self, system, output: torch.Tensor, sample: torch.Tensor, options: dict) -> torch.Tensor:
        """[B, T+1, *latent]: state T, and the noise of every step, drawn as the sequential loop would draw it.

        A step of zeros is its noise times c.
        """
        start = sample.float().unsqueeze(1)
        if not system.c.any():
            return start.expand(-1, self.steps + 1, *sample.shape[1:])   # only state T is ever read
        noise = torch.zeros(len(sample), self.steps + 1, *sample.shape[1:], device=sample.device)
        noise[:, -1:] = start
        scheduler = copy.deepcopy(self.scheduler)
        known = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in known}
        zeros = torch.zeros(sample.shape, device=sample.device)
        for k, timestep in enumerate(self.timesteps):
            row = self.steps - 1 - k
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(zeros, timestep)
            out = scheduler.step(zeros.to(output.dtype), timestep, zeros, return_dict=False, **options)[0]
            if system.c[row] != 0:
                noise[:, row] = out / float(system.c[row])
        return noise

    # -- afterwards ----------------------------------------------------------------------------------------------

    def report(self) -> list[SampleRun]:
        """One a sample; empty for a sequential run."""
        runs = []
        for solver, history in zip(self.solvers, self.history):
            result = solver.result()
            for told, residual in zip(history, result.residuals / self.unit):
                told["residual"] = float(residual[~residual.isnan()].max())
            runs.append(SampleRun(self.window, result.iterations, result.nfe, result.residuals, result.converged,
                                  history))
        if missing := sum(not run.converged for run in runs):
            logger.warning(f"ParaTAA: {missing} of {len(runs)} samples had not converged to {self.config.tolerance:g} "
                           f"after {max(run.iterations for run in runs)} rounds")
        return runs

    def _hold_to_account(self, durations: list[float], calls: int) -> None:
        """Say so, once for a shape, when this took longer than sequential sampling would have."""
        if self.pace.settled or self.pace.row_seconds is None:
            return
        self.pace.settled = True
        rounds = len(durations)
        seconds = sum(durations[1:]) + min(durations[:2])       # the first round may have warmed up or compiled
        line = too_slow(self.pace, self.steps, calls, rounds, seconds)
        if line is not None:
            if self.config.window == "auto":
                self.pace.window = None
                line += "; from now on it is sequential for this shape"
            logger.warning(line)


def _compiles(module: torch.nn.Module) -> bool:
    """Whether a call of a new shape may be compiled first, which is no measure of its speed."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
