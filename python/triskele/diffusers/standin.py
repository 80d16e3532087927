"""The scheduler's stand-in: of the same class to all who ask, but its loop ends when the solver has converged."""

from __future__ import annotations

import copy
import functools
import inspect

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

UNPICKLED = "a pipeline under ParaTAA cannot be pickled; restore() the patch first, or use save_pretrained()"


class Timesteps(torch.Tensor):
    """`scheduler.timesteps`: a tensor in every way but one, that a loop over it is a parallel sampling.

    A slice, or any other operation, gives a plain tensor: a loop over that is sequential.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __iter__(self):
        return self.rounds()


def stand_in(scheduler, sampling):
    """A copy of `scheduler` whose class, seen from outside, is the same; `sampling` is told of loops and steps.

    Copied with its pipeline it is the copy's stand-in; copied by itself, a scheduler as any other. It is not pickled.
    """
    base = type(scheduler)
    signature = inspect.signature(base.step)

    shown = {"plain": None}   # the Timesteps over the plain ones: here, lest a copy of the scheduler copies the model

    def timesteps(self):
        if "timesteps" not in self.__dict__:
            raise AttributeError("timesteps")
        plain = self.__dict__["timesteps"]
        if not isinstance(plain, torch.Tensor):
            return plain
        if shown["plain"] is not plain:
            looped = plain.as_subclass(Timesteps)
            looped.rounds = functools.partial(sampling.rounds, self)
            shown.update(plain=plain, looped=looped)
        return shown["looped"]

    def store(self, value):
        self.__dict__["timesteps"] = value.as_subclass(torch.Tensor) if isinstance(value, Timesteps) else value

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        sampling.abandon()
        return base.set_timesteps(self, *args, **kwargs)

    @functools.wraps(base.step)
    def step(self, *args, **kwargs):
        if not sampling.parallel:
            sampling.sequential_step()
            return base.step(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        values.pop("self")
        keep = values.pop("return_dict", True)
        sample = sampling.step(values)
        return SchedulerOutput(prev_sample=sample) if keep else (sample,)

    def deep_copy(self, memo):
        plain = object.__new__(base)
        plain.__dict__.update(copy.deepcopy(self.__dict__, memo))
        told = sampling.of_copy(memo)
        memo[id(self)] = plain if told is None else stand_in(plain, told)
        return memo[id(self)]

    def shallow_copy(self):
        plain = object.__new__(base)
        plain.__dict__.update(self.__dict__)
        return plain

    def reduce(self, _protocol):
        raise TypeError(UNPICKLED)

    methods = {"timesteps": property(timesteps, store), "set_timesteps": set_timesteps, "step": step,
               "__deepcopy__": deep_copy, "__copy__": shallow_copy, "__reduce_ex__": reduce}
    if hasattr(base, "scale_model_input"):

        @functools.wraps(base.scale_model_input)
        def scale_model_input(self, sample, *args, **kwargs):
            sampling.unscaled = sample
            return base.scale_model_input(self, sample, *args, **kwargs)

        methods["scale_model_input"] = scale_model_input

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    proxy = copy.deepcopy(scheduler)
    proxy.__class__ = type(base.__name__, (base,), {**names, **methods})
    return proxy
