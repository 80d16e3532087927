"""The token grid, carried from the model's inputs to its attention as python ints.

A processor sees a flat row of tokens. A forward pre-hook on the model writes the grid to an object that all of its
processors hold. It holds ints alone, so it traces (`torch.compile(fullgraph=True)`) and needs no word from the device.
The hooks are objects, not closures, so that `copy.deepcopy(model)` keeps hook and processors together.
"""

from __future__ import annotations

import inspect

import torch


class TokenGrid:
    """(t, h, w) of the running forward pass, and whether this step stays dense (VMoBA.dense_steps)."""

    def __init__(self):
        self.size: tuple[int, int, int] | None = None
        self.dense = False


class GridHook:
    """Forward pre-hook of the model: writes `grid.size`, and `grid.dense` where the first steps stay dense.

    steps  a DenseSteps, or None. Only then is the timestep's value read: one host read a call, and a graph break
           under torch.compile.
    """

    def __init__(self, grid: TokenGrid, read, model: torch.nn.Module, timestep_kwarg: str, steps: DenseSteps | None):
        self.grid = grid
        self.read = read
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.timestep_kwarg = timestep_kwarg
        self.steps = steps

    def __call__(self, model, args, kwargs):
        inputs = dict(zip(self.names, args))
        inputs.update(kwargs)
        self.grid.size = self.read(model, inputs)
        if self.steps is not None:
            self.grid.dense = self.steps.is_dense(inputs[self.timestep_kwarg])


class DenseSteps:
    """Whether a timestep belongs to the first `share` of the denoising steps.

    With a pipeline the steps are those of its scheduler's `timesteps` (share 0.25 of 50 steps: the first 13, counting a
    step that has begun). A bare model has no schedule: there the share is of the range of timesteps, `count` wide.
    A batch that mixes timesteps is dense if any of its rows is.
    """

    def __init__(self, share: float, scale: float, pipe=None, count: int = 1000):
        self.share = share
        self.scale = scale
        self.pipe = pipe
        self.count = count
        self._seen: tuple | None = None  # (the scheduler's timesteps, their boundary): one host read a schedule

    def is_dense(self, timestep) -> bool:
        value = float(timestep.detach().max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        return value / self.scale >= self._boundary() * (1 - 1e-4)

    def _boundary(self) -> float:
        """The last (smallest) timestep that stays dense."""
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            return self.count * (1 - self.share)
        if self._seen is None or self._seen[0] is not timesteps:
            values = sorted(set(torch.as_tensor(timesteps).reshape(-1).tolist()), reverse=True)
            dense = -int(-self.share * len(values) // 1)  # rounded up
            self._seen = (timesteps, values[min(dense, len(values)) - 1])
        return self._seen[1]


class TextLength:
    """Number of text tokens in front of the image tokens, for an attention that gets them already joined."""

    def __init__(self):
        self.tokens: int | None = None


class TextLengthHook:
    """Forward pre-hook of a block that joins text and image: writes the number of text tokens.

    It sits on the block, not on the model, so that it runs again when gradient checkpointing recomputes the block.
    """

    def __init__(self, text: TextLength, block: torch.nn.Module):
        self.text = text
        self.position = tuple(inspect.signature(block.forward).parameters).index("encoder_hidden_states")

    def __call__(self, block, args, kwargs):
        states = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[self.position]
        self.text.tokens = states.shape[1]
