"""`patch`: put the arms on a pipeline or a model, all or nothing."""

from __future__ import annotations

import importlib

import torch

from triskele.checks import expected
from triskele.configs import SLA, ParaTAA, SVDQuant, VMoBA
from triskele.diffusers.adapters import adapter_for
from triskele.diffusers.handle import Handle
from triskele.diffusers.undo import UndoLog

CONFIGS = {"attention": (SLA, VMoBA), "linear": (SVDQuant,), "sampler": (ParaTAA,)}
MODELS = ("transformer", "transformer_2", "unet")
MARK = "_triskele_patch"
"""Attribute of a patched model or pipeline: a line that says by what."""


def patch(target, *, attention=None, linear=None, sampler=None) -> Handle:
    """The target, in place, with sparse attention, 4-bit linears and parallel sampling; reversible, all or nothing.

    target     a diffusers pipeline (its transformer, transformer_2 or unet is patched), or such a model by itself, on
               any device, meta included
    attention  SLA or VMoBA; linear: SVDQuant; sampler: ParaTAA (pipelines only). At least one
    Returns a Handle: `summary()`, `restore()`, and a context manager that restores at the end.

    Raises ValueError: nothing to do, a config of another arm, a model that is not supported or already patched, a site
    that the arm cannot reproduce. Whatever is raised half way, the target is left as it was.
    """
    configs = {arm: config for arm, config in
               (("attention", attention), ("linear", linear), ("sampler", sampler)) if config is not None}
    _check_configs(configs)
    models, pipe = models_of(target)
    if pipe is None and sampler is not None:
        raise expected("target with sampler", "a pipeline (a model by itself has no denoising loop)",
                       type(target).__name__)
    for owner in (*models.values(), *([pipe] if pipe is not None else [])):
        if already := owner.__dict__.get(MARK):
            raise ValueError(f"target: expected one that is not patched, got {type(owner).__name__} under the live "
                             f"patch {already}; call restore() on its handle first")
    adapters = {name: adapter_for(model) for name, model in models.items()}
    if attention is not None or linear is not None:
        for model in models.values():
            _refuse_offloaded(model)

    undo = UndoLog()
    replaced = []
    try:
        for name, model in models.items():
            if attention is not None:
                replaced += _arm("attention").apply(model, adapters[name], attention, undo, pipe=pipe)
            if linear is not None:
                replaced += _arm("linear").apply(model, adapters[name], linear, undo)
            if attention is not None or linear is not None:
                _arm("quantizer").attach_config(model, linear=linear, attention=attention, undo=undo)
        if sampler is not None:
            replaced += _arm("sampler").apply(pipe, next(iter(adapters.values())), sampler, undo)
        handle = Handle(target, configs, replaced, undo)
        for owner in (*models.values(), *([pipe] if sampler is not None else [])):
            undo.setattr(owner, MARK, ", ".join(map(str, configs.values())))
    except BaseException:
        undo.rollback()
        raise
    return handle


def _arm(name: str):
    """An arm's module, imported when it is used: each drags in its own part of diffusers."""
    return importlib.import_module(f"triskele.diffusers.{name}")


def _check_configs(configs: dict) -> None:
    if not configs:
        raise ValueError("patch: expected at least one of attention=, linear=, sampler=, got none")
    for arm, config in configs.items():
        if not isinstance(config, CONFIGS[arm]):
            want = " or ".join(f"triskele.{cls.__name__}(...)" for cls in CONFIGS[arm])
            raise expected(arm, want, repr(config))


def _refuse_offloaded(model: torch.nn.Module) -> None:
    """Offload by layers keeps a list of the modules it saw: new ones would stay where they are made."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        groups = registry is not None and registry.get_hook("group_offloading") is not None
        empty = hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False))
        if groups or empty:
            raise ValueError(f"target: expected {type(model).__name__} with its weights in place, got it under "
                             f"{'group' if groups else 'sequential CPU'} offload; patch first, then enable offload")


def models_of(target) -> tuple[dict[str, torch.nn.Module], object | None]:
    """The models to patch by name, and the pipeline they belong to (None for a model by itself)."""
    if isinstance(target, torch.nn.Module):
        return {"model": _unwrap(target)}, None
    parts = {name: getattr(target, name, None) for name in MODELS}
    models = {name: _unwrap(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    if not models:
        raise expected("target", f"a diffusers pipeline with one of {MODELS}, or such a model", type(target).__name__)
    return models, target


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside the wrapper of torch.compile(model)."""
    return getattr(model, "_orig_mod", model)
