"""A denoiser call with more rows: a sample becomes its window, and every row has its own state and timestep."""

from __future__ import annotations

import inspect

import torch

from triskele.checks import expected
from triskele.diffusers.interface import Adapter


class Call:
    """A call of the denoiser, its arguments by name.

    latents  the adapter's latent_kwarg, [batch, ...]: in some pipelines with a condition's channels behind the latents
    """

    def __init__(self, adapter: Adapter, module: torch.nn.Module, args, kwargs):
        self.adapter, self.module = adapter, module
        self.name = type(getattr(module, "_orig_mod", module)).__name__    # inside the wrapper of torch.compile
        signature = inspect.signature(type(getattr(module, "_orig_mod", module)).forward)
        bound = signature.bind(module, *args, **kwargs)
        self.arguments = dict(list(bound.arguments.items())[1:])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                self.arguments.update(self.arguments.pop(parameter.name, {}))
        self.latents = self.arguments[adapter.latent_kwarg]
        self.batch = self.latents.shape[0]

    def check(self, timestep: torch.Tensor) -> None:
        """ValueError for an argument that can't be widened, and unless the model gets the scheduler's `timestep`."""
        adapter = self.adapter
        known = {adapter.latent_kwarg, adapter.timestep_kwarg, *adapter.batch_kwargs, *adapter.shared_kwargs}
        for name, value in self.arguments.items():
            if name not in known and _holds_tensor(value):
                raise ValueError(f"ParaTAA: {self.name} was called with {name}, and the {adapter.family} adapter does "
                                 "not say how to repeat it for the rows of a window (control networks and image "
                                 "prompts are not supported)")
        given = torch.as_tensor(self.arguments[adapter.timestep_kwarg]).flatten().double()
        want = self._timesteps(timestep.reshape(1)).flatten()[0].double().to(given.device)
        if not torch.allclose(given, want, rtol=1e-2, atol=1e-6):
            raise expected(f"{adapter.timestep_kwarg} of {self.name}",
                           f"{float(want):g} at the scheduler's {float(timestep):g}", given[:4].tolist())

    def widened(self, latents: torch.Tensor, timesteps: torch.Tensor, counts: list[int]) -> dict:
        """The arguments with `counts[n]` rows in the place of row n.

        latents    [sum(counts), ...]: all rows, first those of row 0; without a condition's channels they are added
        timesteps  [sum(counts)], in the scheduler's units
        """
        even = len(set(counts)) == 1
        repeats = counts[0] if even else torch.tensor(counts, device=self.latents.device)
        arguments = dict(self.arguments)
        for name in self.adapter.batch_kwargs:
            if arguments.get(name) is not None:
                arguments[name] = self._repeated(name, arguments[name], repeats)
        latents = latents.to(self.latents.dtype)
        if latents.shape[1:] != self.latents.shape[1:]:
            channels = latents.shape[1] if latents.dim() > 1 else 0
            condition = self.latents[:, channels:].repeat_interleave(repeats, dim=0)
            if channels >= self.latents.shape[1] or condition.shape[2:] != latents.shape[2:]:
                raise expected(f"{self.adapter.latent_kwarg} of {self.name}",
                               f"latents {list(latents.shape[1:])}, or those with further channels behind them",
                               list(self.latents.shape[1:]))
            latents = torch.cat([latents, condition], dim=1)
        arguments[self.adapter.latent_kwarg] = latents
        arguments[self.adapter.timestep_kwarg] = self._timesteps(timesteps)
        return arguments

    def _timesteps(self, rows: torch.Tensor) -> torch.Tensor:
        given = torch.as_tensor(self.arguments[self.adapter.timestep_kwarg])
        rows = rows.to(self.latents.device, given.dtype)
        if self.adapter.timestep_scale != 1:
            rows = rows / (1 / self.adapter.timestep_scale)   # as the pipelines: t / 1000 and t * 0.001 round apart
        return rows

    def _repeated(self, name: str, value, repeats):
        if isinstance(value, torch.Tensor):
            if value.dim() == 0 or (value.shape[0] == 1 and self.batch > 1):
                return value
            if value.shape[0] != self.batch:
                raise expected(f"{name} of {self.name}", f"{self.batch} rows, as {self.adapter.latent_kwarg}",
                               list(value.shape))
            return value.repeat_interleave(repeats, dim=0)
        if isinstance(value, dict):
            return {key: self._repeated(f"{name}[{key!r}]", item, repeats) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._repeated(name, item, repeats) for item in value)
        return value


def _holds_tensor(value) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)
