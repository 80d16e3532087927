"""Fine-tuning a patched model to its dense teacher: how sparse attention gets its quality back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from triskele.checks import check_choice, check_int, expected

PATCHED = "triskele_sla"  # the child module that carries SLA's parameters


@dataclass
class DistillResult:
    """Losses of every step: `distillation` against the teacher, `diffusion` against the data (None where not used)."""

    distillation: list[float] = field(default_factory=list)
    diffusion: list[float] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    train           "projection": the parameters of the linear branch alone; "all": every weight of the model
    steps           optimiser steps
    lr              AdamW's rate, warmed up over the first twentieth and then falling to a tenth along a cosine
    teacher_weight  of MSE(student, teacher); data_weight: of MSE(student, target), 0 needs no target in the batches
    """

    train: str = "all"
    steps: int = 200
    lr: float = 1e-4
    teacher_weight: float = 1.0
    data_weight: float = 0.0

    def __post_init__(self):
        check_choice("train", self.train, ("projection", "all"))
        check_int("steps", self.steps, low=1)
        if self.teacher_weight < 0 or self.data_weight < 0 or self.teacher_weight + self.data_weight == 0:
            raise expected("teacher_weight, data_weight", "non-negative numbers, not both zero",
                           (self.teacher_weight, self.data_weight))


RECIPE = (Stage("projection", 100, 1e-3), Stage("all", 400, 1e-4, 1.0, 0.5))
"""Projection first, against the teacher alone; then all weights, with the diffusion loss (SLA, section 5)."""


def distill_attention(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[dict, torch.Tensor | None]],
    stages: tuple[Stage, ...] = RECIPE,
    *,
    ema: float | None = 0.99,
    autocast: torch.dtype | None = None,
    progress: bool = True,
    on_step: Callable[[int, nn.Module], None] | None = None,
) -> DistillResult:
    """min over the student's weights of  w_t |f_s(x) - f_t(x)|^2 + w_d |f_s(x) - target|^2  (means over elements).

    student   a transformer patched with `SLA` (any scope; its linear branch is what "projection" trains), in place
    teacher   the same model, dense: `copy.deepcopy(model)` before patching. Not changed.
    batches   yields (kwargs, target): kwargs go to both models' forward; target is the data's noise or velocity, and
              may be None where no stage has a data_weight. Read until the stages are done; it may be endless.
    stages    see `Stage`
    ema       decay of the averaged weights that the student ends with; None: its last weights
    autocast  dtype for the matrix products of both models on their device, or None

    Returns the losses of every step. Raises ValueError for an unpatched student, a teacher of other shape, too few
    batches; FloatingPointError with the step when a loss is not finite, the student then as it was at the last step.
    Source: SLA, arXiv 2509.24006, section 5 and TurboDiffusion, arXiv 2512.16093.
    """
    from tqdm.auto import tqdm

    _check(student, teacher, stages)
    device = next(student.parameters()).device
    teacher_state = (teacher.training, [p.requires_grad for p in teacher.parameters()])
    student_state = (student.training, [(p, p.requires_grad) for p in student.parameters()])
    teacher.eval().requires_grad_(False)
    student.train()
    result, batches = DistillResult(), iter(batches)
    try:
        bar = tqdm(total=sum(s.steps for s in stages), desc="distilling", disable=not progress)
        for stage in stages:
            parameters = _trainable(student, stage)
            result.trained += [name for name in parameters if name not in result.trained]
            optimizer = torch.optim.AdamW(parameters.values(), lr=stage.lr, weight_decay=0.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(stage.steps))
            averaged = {name: p.detach().clone() for name, p in parameters.items()} if ema is not None else {}
            for step in range(stage.steps):
                context = torch.autocast(device.type, autocast) if autocast else nullcontext()
                losses = _losses(student, teacher, _next(batches, stage, result), stage, context)
                loss = stage.teacher_weight * losses[0] + stage.data_weight * losses[1]
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"distill_attention: loss {loss.item()} at step {step} of {stage}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                scheduler.step()
                decay = min(ema or 0.0, (1 + step) / (10 + step))  # short averages while the weights still move far
                for name, mean in averaged.items():
                    mean.lerp_(parameters[name].detach(), 1 - decay)
                result.distillation.append(losses[0].item())
                result.diffusion.append(losses[1].item())
                bar.update()
                bar.set_postfix(teacher=f"{losses[0]:.2e}", data=f"{losses[1]:.2e}")
                if on_step is not None:
                    on_step(len(result.distillation), student)
            with torch.no_grad():
                for name, mean in averaged.items():
                    parameters[name].copy_(mean)
        bar.close()
    finally:
        for p, required in student_state[1]:
            p.requires_grad_(required)
        student.train(student_state[0])
        teacher.train(teacher_state[0])
        for p, required in zip(teacher.parameters(), teacher_state[1]):
            p.requires_grad_(required)
    return result


def teacher_of(model: nn.Module) -> nn.Module:
    """A dense copy of an unpatched model, to be taken before `patch`."""
    if any(name.endswith(PATCHED) for name, _ in model.named_modules()):
        raise ValueError("teacher_of: expected an unpatched model, got one that carries SLA; copy it before patch()")
    return copy.deepcopy(model)


def _check(student, teacher, stages) -> None:
    if not stages or not all(isinstance(s, Stage) for s in stages):
        raise expected("stages", "a non-empty tuple of Stage", stages)
    if not any(name.endswith(PATCHED) for name, _ in student.named_modules()):
        raise expected("student", "a model patched with attention=SLA(...)", "no sparse attention in it")
    if any(name.endswith(PATCHED) for name, _ in teacher.named_modules()):
        raise expected("teacher", "the dense model", "one that carries sparse attention")
    dense = {n: tuple(p.shape) for n, p in student.named_parameters() if f".{PATCHED}." not in n}
    have = {n: tuple(p.shape) for n, p in teacher.named_parameters()}
    if dense != have:
        differing = sorted(set(dense.items()) ^ set(have.items()))[:3]
        raise expected("teacher", "the student's weights apart from its linear branch", f"a difference at {differing}")


def _trainable(student, stage) -> dict[str, nn.Parameter]:
    student.requires_grad_(False)
    chosen = {name: p for name, p in student.named_parameters()
              if p.is_floating_point() and (stage.train == "all" or f".{PATCHED}." in name)}
    if not chosen:
        raise expected("stage train='projection'", "an SLA with a linear branch (linear='proj' or 'alpha')",
                       "no parameters to train")
    for p in chosen.values():
        p.requires_grad_(True)
    return chosen


def _warm_cosine(steps: int):
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        turn = torch.pi * (step - warm) / max(1, steps - warm)
        return 0.1 + 0.45 * (1 + float(torch.cos(torch.tensor(turn))))

    return factor


def _next(batches, stage, result):
    try:
        kwargs, target = next(batches)
    except StopIteration:
        raise ValueError(f"batches: expected enough for all stages, got {len(result.distillation)}") from None
    if stage.data_weight and target is None:
        raise expected("batches", f"a target (data_weight is {stage.data_weight})", "None")
    return kwargs, target


def _losses(student, teacher, batch, stage, context):
    kwargs, target = batch
    with context:
        with torch.no_grad():
            wanted = _tensor(teacher(**kwargs)) if stage.teacher_weight else None
        got = _tensor(student(**kwargs)).float()
    zero = got.new_zeros(())
    distillation = nn.functional.mse_loss(got, wanted.float()) if wanted is not None else zero
    diffusion = nn.functional.mse_loss(got, target.float()) if stage.data_weight else zero
    return distillation, diffusion


def _tensor(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
