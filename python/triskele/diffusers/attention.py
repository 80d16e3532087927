"""The attention arm: SLA or VMoBA in the place of a model's self-attention, set by name and only where it belongs."""

from __future__ import annotations

import functools

import torch

from triskele.configs import SLA, VMoBA
from triskele.diffusers.explain import backend_of
from triskele.diffusers.grid import DenseSteps, GridHook, TextLength, TextLengthHook, TokenGrid
from triskele.diffusers.interface import Adapter, Replaced
from triskele.diffusers.processor import SLA_CHILD, VMOBA_CHILD, SparseProcessor
from triskele.diffusers.undo import UndoLog

MAX_HEAD_DIM = 256


def apply(model: torch.nn.Module, adapter: Adapter, config: SLA | VMoBA, undo: UndoLog, pipe=None) -> list[Replaced]:
    """Put sparse attention on every site of `adapter`. Works on a model on the meta device too.

    pipe  the pipeline that the model is part of, if any: VMoBA.dense_steps counts the steps of its scheduler
    """
    if reason := _refusal(model, adapter):
        raise ValueError(f"attention: {adapter.family} cannot be patched: {reason}")
    sites = adapter.attention.find(model)
    modules = {site.name: model.get_submodule(site.name) for site in sites}
    for name, attn in modules.items():
        _check_site(name, attn, adapter)

    sparse = isinstance(config, SLA)
    grid = None if sparse else TokenGrid()
    report = []
    for site in sites:
        attn = modules[site.name]
        was = type(attn.processor).__name__
        if why := _left_dense(site.layer, len(sites), config):
            report.append(Replaced("attention", site.name, was, f"left dense ({why})"))
            continue
        child = _core(attn, config, site.layer, adapter.attention.joint)
        undo.set_module(attn, SLA_CHILD if sparse else VMOBA_CHILD, child)
        text = None
        if site.block is not None:
            text = TextLength()
            block = model.get_submodule(site.block)
            undo.register_hook(block.register_forward_pre_hook(TextLengthHook(text, block), with_kwargs=True))
        processor = adapter.attention.processor(SLA_CHILD if sparse else VMOBA_CHILD, grid=grid, text=text)
        undo.set_processor(attn, processor)
        report.append(Replaced("attention", site.name, was, type(config).__name__,
                               ask=functools.partial(_backend_of, config, attn)))
    if grid is not None:
        steps = DenseSteps(config.dense_steps, adapter.timestep_scale, pipe) if config.dense_steps else None
        hook = GridHook(grid, adapter.attention.grid, model, adapter.timestep_kwarg, steps)
        undo.register_hook(model.register_forward_pre_hook(hook, with_kwargs=True))
    return report


def _refusal(model, adapter: Adapter) -> str | None:
    """Why this model as a whole cannot be patched, or None."""
    if isinstance(adapter.attention, str):
        return adapter.attention
    if getattr(model, "is_cache_enabled", False):
        return "a cache is enabled on it (enable_cache), which stands in for attention by itself; disable_cache() first"
    if reason := adapter.attention.refuse(model):
        return reason
    return None


def _check_site(name: str, attn, adapter: Adapter) -> None:
    """ValueError for a site whose processor or shape the adapter does not reproduce."""
    was = type(attn.processor).__name__
    if isinstance(attn.processor, SparseProcessor):
        raise ValueError(f"attention: {name} is sparse already (a checkpoint saved under a patch loads as it was); "
                         "expected a dense model")
    if was not in adapter.attention.originals:
        raise ValueError(f"attention: {name} has the processor {was}; expected one of {adapter.attention.originals} "
                         "(remove the IP-Adapter, guidance or other hook that put it there)")
    if getattr(attn.processor, "_parallel_config", None) is not None:
        raise ValueError(f"attention: {name} runs under context parallelism, in which a device sees only its part of "
                         "the tokens; expected none")
    head_dim = _head_dim(attn)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"attention: {name} has head_dim {head_dim}; expected 1 to {MAX_HEAD_DIM}")
    for projection in ("to_k", "to_v"):
        linear = getattr(attn, projection, None)
        if linear is None or linear.out_features != attn.to_q.out_features:
            got = "none" if linear is None else f"{linear.out_features} features"
            raise ValueError(f"attention: {name}.{projection} has {got}; expected {attn.to_q.out_features}, "
                             "as many as to_q (no grouped keys, no cross-attention)")


def _head_dim(attn) -> int:
    return attn.to_q.out_features // attn.heads


def _device(attn) -> torch.device:
    return next(attn.parameters()).device


def _dtype(attn) -> torch.dtype:
    """The dtype in which the module computes. Weights stored in 8 bits are widened before they are used."""
    dtypes = [p.dtype for p in attn.parameters() if p.is_floating_point() and p.element_size() > 1]
    return dtypes[0] if dtypes else torch.get_default_dtype()


def _backend_of(config: SLA | VMoBA, attn) -> tuple[str, tuple[str, ...]]:
    return backend_of(config, _device(attn), _dtype(attn), _head_dim(attn))


def _left_dense(layer: int, layers: int, config) -> str | None:
    """Why the config leaves this layer alone, or None."""
    if isinstance(config, SLA):
        first, last = config.skip_layers
        return "skip_layers" if layer < first or layer >= layers - last else None
    return "dense_layers" if layer < config.dense_layers else None


def _core(attn, config, layer: int, joint: bool) -> torch.nn.Module:
    """The sparse attention of one site, on the device and in the dtype of its attention module."""
    from triskele import nn
    from triskele.nn.vmoba_joint import JointVMoBAAttention

    if isinstance(config, VMoBA):
        return (JointVMoBAAttention if joint else nn.VMoBAAttention)(config, layer).train(attn.training)
    core = nn.SparseLinearAttention(_head_dim(attn), config, num_heads=attn.heads, device="meta", dtype=_dtype(attn))
    device = _device(attn)
    if device.type != "meta":  # made without drawing random numbers: a seed set before patch() gives what it gave
        core.to_empty(device=device)
        core.reset_parameters()
    return core.train(attn.training)
