"""The sampler arm: parallel sampling (ParaTAA) inside a diffusers pipeline, whose own `__call__` stays the driver.

    for t in scheduler.timesteps:        one turn of the pipeline's loop is one round of the solver
        eps = model(latents, t, ...)     a pre-hook widens the call: each sample becomes its window of rows, every row
                                         with its own state and timestep; text and the like are repeated
        eps = guidance(eps)              the pipeline's own code, row by row
        latents = scheduler.step(...)    the scheduler's stand-in moves one solver a sample, and returns the lowest
                                         state of its window: at the end, the sample
    decode(latents)                      the stand-in's timesteps end when every solver has converged

So prompts, guidance, callbacks, progress bars and decoding remain the pipeline's. In the first round all rows are
copies of the initial noise: nothing has to be known before the first `step()`, which tells the latents without
guidance's copies, eta and the generator. Noise is then drawn at once, in the order of the sequential loop.
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref

import torch

from triskele.backend import explain
from triskele.checks import expected
from triskele.configs import ParaTAA
from triskele.diffusers import modulation
from triskele.diffusers.explain import answer
from triskele.diffusers.grid import GridHook
from triskele.diffusers.interface import SAMPLER, Adapter, Replaced
from triskele.diffusers.pace import Pace
from triskele.diffusers.rounds import Run, SampleRun
from triskele.diffusers.standin import UNPICKLED, Timesteps, stand_in
from triskele.diffusers.undo import UndoLog
from triskele.sampling import TriangularSystem

logger = logging.getLogger("triskele")


def apply(pipe, adapter: Adapter, config: ParaTAA, undo: UndoLog) -> list[Replaced]:
    """Replace `pipe.scheduler` by its stand-in and hook the denoiser.

    Raises ValueError, with the reason, for a pipeline that has not been tried, one that the adapter refuses, an enabled
    cache, and a scheduler whose step is not linear.
    """
    denoiser = _refuse_pipeline(pipe, adapter)
    scheduler = pipe.scheduler
    _refuse_scheduler(scheduler)
    sampling = Sampling(pipe, adapter, config, denoiser)
    undo.setattr(pipe, "scheduler", stand_in(scheduler, sampling))
    undo.register_hook(denoiser.register_forward_pre_hook(sampling.widen, with_kwargs=True, prepend=True))
    undo.setattr(pipe, SAMPLER, sampling)
    window = {"auto": "a measured window", None: "all steps"}.get(config.window, f"a window of {config.window}")
    return [Replaced("sampler", "scheduler", type(scheduler).__name__, f"ParaTAA over {window}",
                     ask=functools.partial(_backend_of, config, denoiser)),
            *modulation.apply(denoiser, adapter, undo)]


class Sampling:
    """What the stand-in and the denoiser's hook share; `Handle.sampler`.

    last    a `SampleRun` for each sample of the last parallel call; empty after a sequential one
    config  the ParaTAA in use

    A copy of the pipeline (`copy.deepcopy`) samples in parallel as well, with a Sampling of its own; a handle restores
    the pipeline that was patched, not its copies.
    """

    def __init__(self, pipe, adapter: Adapter, config: ParaTAA, denoiser: torch.nn.Module):
        self.adapter, self.config, self.denoiser = adapter, config, denoiser
        self._pipe = weakref.ref(pipe)
        self.last: list[SampleRun] = []
        self.unscaled: torch.Tensor | None = None   # what the pipeline last gave to scale_model_input
        self.paces: dict[tuple, Pace] = {}          # shape of a call -> what is known of its speed
        self._run: Run | None = None
        self._system: tuple | None = None
        self._warned = False

    def __deepcopy__(self, memo) -> Sampling:
        """For the copy of the pipeline under way; it has not sampled yet."""
        new = memo[id(self)] = object.__new__(type(self))
        pipe = self._pipe()
        new.__init__(memo.get(id(pipe), pipe), self.adapter, self.config, copy.deepcopy(self.denoiser, memo))
        return new

    def of_copy(self, memo) -> Sampling | None:
        """The Sampling of the copied pipeline inside a deepcopy of it; None where less than the pipeline is copied."""
        pipe = self._pipe()
        return copy.deepcopy(self, memo) if pipe is not None and id(pipe) in memo else None

    def __getstate__(self):
        raise TypeError(UNPICKLED)

    @property
    def parallel(self) -> bool:
        """Whether a parallel sampling is under way."""
        return self._run is not None and self._run.parallel

    def rounds(self, scheduler):
        """The loop over the stand-in's timesteps. Inside a sampling (a hook that looks at them), it is a plain loop."""
        if self._run is not None:
            yield from scheduler.timesteps.as_subclass(torch.Tensor)
            return
        refuse_cache(self.denoiser)
        run = self._run = Run(self, scheduler)
        try:
            yield from run.turns()
            self.last = run.report()
        finally:
            if self._run is run:
                self.abandon()

    def abandon(self) -> None:
        """Forget a sampling that was left half way."""
        self._run = self.unscaled = None

    def widen(self, module, args, kwargs):
        """Forward pre-hook of the denoiser."""
        if self._run is not None:
            return self._run.widen(module, args, kwargs)
        pipe = self._pipe()
        if pipe is not None and not isinstance(getattr(pipe.scheduler, "timesteps", None), Timesteps):
            self._warn("ParaTAA: pipe.scheduler was replaced after patching, so sampling is sequential; restore() the "
                       "patch, then set the scheduler, then patch again")
        return None

    def step(self, values: dict) -> torch.Tensor:
        """The stand-in's `step()` while `parallel`; values: its arguments by name."""
        return self._run.step(values)

    def sequential_step(self) -> None:
        """The stand-in's `step()` runs as the scheduler's own."""
        if self._run is not None:
            self._run.settle_sequential()
        else:
            self._warn("ParaTAA: this loop does not run over scheduler.timesteps as a whole (image to image takes a "
                       "slice of it), so it is sequential")

    def _warn(self, line: str) -> None:
        """Once."""
        if not self._warned:
            self._warned = True
            logger.warning(line)

    def system(self, scheduler, eta: float) -> TriangularSystem:
        """The scheduler's equations; probed once for a schedule."""
        sigmas = getattr(scheduler, "sigmas", None)
        sigmas = None if sigmas is None else tuple(torch.as_tensor(sigmas).tolist())
        key = (eta, tuple(scheduler.timesteps.tolist()), sigmas)
        if self._system is None or self._system[0] != key:
            self._system = (key, TriangularSystem.from_scheduler(scheduler, eta=eta))
        return self._system[1]


def refuse_cache(denoiser: torch.nn.Module) -> None:
    """A cache counts steps or reuses the last call's features; a window is several steps in one call."""
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError("sampler: a cache is enabled on the model (enable_cache), which carries features from one step"
                         " to the next, and ParaTAA evaluates several steps in one call; disable_cache() first")


def _refuse_pipeline(pipe, adapter: Adapter) -> torch.nn.Module:
    """The denoiser of a pipeline that can be sampled in parallel; ValueError for any other."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    if not any(name in adapter.pipelines for name in names):
        raise expected("sampler", f"one of the pipelines {adapter.pipelines} for the {adapter.family} family", names[0])
    if reason := adapter.sampler_refusal(pipe):
        raise ValueError(f"sampler: {names[0]} cannot be sampled in parallel: {reason}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"sampler: {names[0]} cannot be sampled in parallel: it has two transformers, one for each "
                         "part of the timesteps, and a window holds several timesteps")
    denoiser = pipe.transformer if getattr(pipe, "transformer", None) is not None else getattr(pipe, "unet", None)
    if denoiser is None:
        raise expected("sampler", "a pipeline with a transformer or a unet", names[0])
    refuse_cache(denoiser)
    if any(isinstance(hook, GridHook) and hook.steps is not None for hook in denoiser._forward_pre_hooks.values()):
        raise ValueError("sampler: VMoBA(dense_steps > 0) cannot be combined with ParaTAA: dense and sparse timesteps "
                         "share a denoiser call, and a row's output would depend on its neighbours; dense_steps=0")
    return denoiser


def _refuse_scheduler(scheduler) -> None:
    """Probe a short schedule, so that a scheduler that cannot be made triangular is refused before anything runs."""
    if isinstance(getattr(scheduler, "timesteps", None), Timesteps):
        raise ValueError("sampler: the scheduler is under another live patch of ParaTAA; restore() that one first")
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting", False) else {}
    TriangularSystem.from_scheduler(scheduler, 4, **shift)


def _backend_of(config: ParaTAA, denoiser: torch.nn.Module) -> tuple[str, tuple[str, ...]]:
    import triskele.ops  # noqa: F401  enters the tables

    device = next(denoiser.parameters()).device
    if device.type == "meta":
        return "", ()
    window = config.window if isinstance(config.window, int) else 1
    rows = torch.zeros(window, 1, device=device)
    weights = torch.zeros(window, dtype=torch.float64, device=device)
    past = [rows] * (config.memory - 1)
    inputs = (torch.zeros(window + 1, 1, device=device), rows, None, weights, weights[:, None], weights, past, window)
    return answer(explain("taa.residual", *inputs, backend=config.backend))
