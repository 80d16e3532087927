"""Reads a scheduler's weights off its own `step()`, so that no sampler's formulas are written a second time.

Every state x_j, model output ε_j and noise draw ξ_i is a unit vector of one basis, laid out along the channel axis of
the "sample"; a step is elementwise, so its output holds the weight of each. One pass over the timesteps gives all of
them. A sampler that looks back at earlier states (DPM-Solver++, UniPC with its corrector, PNDM) gets those replaced by
the newest state and the model outputs in between. A replay on random numbers then tells a step that is not linear.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch.overrides import TorchFunctionMode

from triskele.checks import check_int, expected

TOLERANCE = 1e-6     # of the replay, relative to the largest state: far above rounding, far below any nonlinearity
_NONLINEAR = {  # option -> values under which a step is linear
    "clip_sample": (False, None), "thresholding": (False, None), "use_clipped_model_output": (False, None),
}


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"scheduler: {name} cannot be made triangular: {reason}")


class _InFloat64(TorchFunctionMode):
    """While a scheduler steps: tensors of the probe's shape stay float64, and draws of noise come from `draw`."""

    def __init__(self, shape, draw):
        super().__init__()
        self.shape, self.draw = torch.Size(shape), draw

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like, torch.normal):
            drawn = func(*args, **kwargs)
            return self.draw() if drawn.shape == self.shape else drawn
        out = func(*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type) and args[0].dtype == torch.float64 \
                and out.shape == self.shape and out.is_floating_point():
            return args[0]
        return out


@torch.random.fork_rng(devices=[])  # a step draws noise: not from the caller's generator
def probe(scheduler, num_steps, eta, set_timesteps: dict) -> dict:
    """Arguments for `TriangularSystem`."""
    name = type(scheduler).__name__
    for method in ("set_timesteps", "step", "timesteps"):
        if not hasattr(scheduler, method):
            raise expected("scheduler", f"a diffusers scheduler (with `{method}`)", name)
    _refuse_options(scheduler, name)
    ready = _prepared(scheduler, num_steps, set_timesteps)
    timesteps = ready.timesteps[(getattr(ready, "begin_index", None) or 0):].detach().cpu()
    if not (isinstance(eta, (int, float)) and 0 <= eta <= 1):
        raise expected("eta", "a number in [0, 1]", repr(eta))
    parameters = inspect.signature(ready.step).parameters
    if list(parameters)[:3] != ["model_output", "timestep", "sample"]:
        raise _refusal(name, f"its step() takes {list(parameters)[:4]}, expected model_output, timestep, sample")
    options = {"eta": float(eta)} if "eta" in parameters else {}

    *responses, scale = _unit_responses(copy.deepcopy(ready), timesteps, options, name)
    a, b, c = _eliminate(*responses, name)
    if eta and not options and not (eta == 1 and bool(c.any())):
        raise expected("eta", f"0 ({name}.step() takes no eta)", eta)
    system = {"a": a, "b": b[:, 0] if b.shape[1] == 1 else b, "c": c, "timesteps": timesteps.flip(0),
              "init_scale": float(getattr(ready, "init_noise_sigma", 1.0)), "input_scale": scale.flip(0)}
    _verify(ready, timesteps, options, a, b, c, name)
    return system


def _refuse_options(scheduler, name: str) -> None:
    config = getattr(scheduler, "config", {})
    for option, linear in _NONLINEAR.items():
        if config.get(option) not in linear:
            raise _refusal(name, f"{option}={config.get(option)!r} makes its step nonlinear; "
                                 f"set {option}={linear[0]!r} where the model allows it")
    if str(config.get("variance_type", "")).startswith("learned"):
        raise _refusal(name, f"variance_type={config.get('variance_type')!r} takes the noise's weight "
                             "from the model's output")


def _prepared(scheduler, num_steps, set_timesteps: dict):
    """A deep copy whose timesteps are set and whose history is empty."""
    ready = copy.deepcopy(scheduler)
    if num_steps is not None:
        check_int("num_steps", num_steps, low=1)
        ready.set_timesteps(num_steps, **set_timesteps)
    elif set_timesteps:
        ready.set_timesteps(**set_timesteps)
    elif getattr(ready, "num_inference_steps", None) is None:
        raise expected("num_steps", "a number of steps, or a scheduler after set_timesteps", None)
    if getattr(ready, "step_index", None) is not None:
        raise expected("scheduler", "one that has not stepped since set_timesteps", f"step_index {ready.step_index}")
    return ready


def _unit_responses(scheduler, timesteps, options, name: str):
    """Weights of states, model outputs and noise in each step, three [T, T], column k the k-th call's; input scales."""
    steps = len(timesteps)
    shape = (1, 3 * steps, 1, 1)
    unit = torch.eye(3 * steps, dtype=torch.float64)[:, None, :, None, None]  # unit[k]: [1, 3T, 1, 1]
    rows, scales = torch.zeros(steps, 3 * steps, dtype=torch.float64), torch.ones(steps, dtype=torch.float64)
    for k, timestep in enumerate(timesteps):
        draws = []

        def draw(k=k, draws=draws):
            draws.append(k)
            return unit[2 * steps + k].clone()

        out, scaled = _step(scheduler, unit[k].clone(), unit[steps + k].clone(), timestep, shape, draw, options, name)
        if len(draws) > 1:
            raise _refusal(name, f"it draws noise {len(draws)} times in a step")
        rows[k], scales[k] = out.flatten(), scaled.flatten()[k]
        if not torch.equal(scaled, scales[k] * unit[k]):
            raise _refusal(name, "scale_model_input is not a scaling")
    if not rows.isfinite().all():
        raise _refusal(name, "its step gives a NaN or infinity on unit inputs")
    return *rows.split(steps, dim=1), scales


def _step(scheduler, sample, output, timestep, shape, draw, options, name: str):
    """(the state after the step, the model's input before it)"""
    scaled = sample
    with torch.no_grad(), _InFloat64(shape, draw):
        if hasattr(scheduler, "scale_model_input"):  # some schedulers insist on it before step()
            scaled = scheduler.scale_model_input(sample.clone(), timestep)
        result = scheduler.step(output, timestep, sample, return_dict=False, **options)[0]
    if result.shape != sample.shape:
        raise _refusal(name, f"its step turns shape {tuple(sample.shape)} into {tuple(result.shape)}")
    return result.double(), scaled.double()


def _eliminate(states, outputs, noises, name: str):
    """(a [T], b [T, p], c [T]), in the order of the system (state 0 first), p as small as the weights allow."""
    steps = len(states)
    a, c = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    b = torch.zeros(steps, steps, dtype=torch.float64)     # by call: b[k, k'] multiplies ε of call k'
    for k in range(steps):
        weight, b[k], noise = states[k].clone(), outputs[k], noises[k].clone()
        for older in range(k):                              # x_older from x_{older+1}, until only x_k is left
            if weight[older] == 0:
                continue
            if a[older] == 0:
                raise _refusal(name, f"step {k} looks back at a state that the one after it does not "
                                     f"determine (step {older} has a = 0)")
            share = weight[older] / a[older]
            weight[older + 1] += share
            b[k] -= share * b[older]
            noise[older] -= share * c[older]
            weight[older] = 0
        stray = noise.clone()
        stray[k] = 0
        if stray.abs().max() > 1e-12:
            raise _refusal(name, f"step {k} depends on the noise of an earlier step, so its noise is not one term")
        a[k], c[k] = weight[k], noise[k]
    newest = torch.zeros_like(b)
    for k in range(steps):
        newest[k, :k + 1] = b[k, :k + 1].flip(0)
    newest[newest.abs() <= 1e-15 * newest.abs().amax(1, keepdim=True)] = 0
    used = newest.any(0).nonzero()
    depth = int(used.max()) + 1 if used.numel() else 1
    return a.flip(0), newest[:, :depth].flip(0), c.flip(0)


def _verify(scheduler, timesteps, options, a, b, c, name: str) -> None:
    """Replay on random numbers; a deviation of more than `TOLERANCE` is a nonlinear step."""
    steps, shape = len(timesteps), (1, 64, 1, 1)
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state = normal() * 3
    mine, past, worst, largest = state.clone(), [], 0.0, 1.0
    for k, timestep in enumerate(timesteps):
        noise, row = normal(), steps - 1 - k
        past.insert(0, normal() * 2)
        state, _ = _step(scheduler, state, past[0].clone(), timestep, shape, noise.clone, options, name)
        mine = a[row] * mine + sum(w * e for w, e in zip(b[row], past)) + c[row] * noise
        worst = max(worst, float((mine - state).abs().max()))
        largest = max(largest, float(state.abs().max()))
    if not worst <= TOLERANCE * largest:
        raise _refusal(name, f"a linear replay of its step deviates by {worst:.2e} (states up to {largest:.2e})")
