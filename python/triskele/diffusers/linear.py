"""The linear arm: 4-bit SVDQuant linears in the place of a model's own, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from triskele.backend import explain
from triskele.checks import check_int, expected
from triskele.configs import SVDQuant
from triskele.diffusers.explain import answer
from triskele.diffusers.gelu import fuse
from triskele.diffusers.interface import Adapter, Replaced
from triskele.diffusers.undo import UndoLog

METHOD = "triskele"
"""`quant_method` of the quantizer that saves and loads what this arm makes (quantizer.py)."""

PROGRESS_ELEMENTS = 50_000_000
"""A progress bar from so many weights on: a minute or more of quantizing."""


def apply(model: nn.Module, adapter: Adapter, config: SVDQuant, undo: UndoLog,
          activations: dict[str, torch.Tensor] | None = None) -> list[Replaced]:
    """Replace the linears of `adapter` that `config` includes; on the meta device by empty ones, for weights to come.

    activations  name of a linear -> a sample [..., K] of its inputs (`collect_activations`), on which its smoothing is
                 searched; linears that are not named are quantized without

    Raises ValueError for a refused family, a pattern that matches no linear, a model under another quantizer or LoRA.
    """
    names = sites(model, adapter, config)
    if unknown := set(activations or ()) - set(names):
        raise expected("activations", f"names among the {len(names)} linears to quantize", sorted(unknown))
    report = []
    with _progress(model, names) as bar:
        for name in names:
            linear = model.get_submodule(name)
            try:
                quantized = _quantized(linear, config, (activations or {}).get(name))
            except ValueError as error:
                raise ValueError(f"linear: {name} [{linear.out_features}, {linear.in_features}]: {error}") from error
            parent, _, child = name.rpartition(".")
            undo.call(functools.partial(_follow, linear, quantized))
            owner = model.get_submodule(parent)
            undo.set_module(owner, child, quantized)
            was, now = type(linear).__name__, type(quantized).__name__
            if fuse(owner, undo):
                was, now = f"{was} and GELU", f"{now} with GELU"
            report.append(Replaced("linear", name, was, now, ask=functools.partial(backend_of, quantized)))
            bar.update(linear.weight.numel())
    return report


def sites(model: nn.Module, adapter: Adapter, config: SVDQuant) -> list[str]:
    """Names of the linears that `config` would have quantized, in the model's order; ValueError as `apply`."""
    if isinstance(adapter.linear_names, str):
        raise ValueError(f"linear: {adapter.family} cannot be patched: {adapter.linear_names}")
    _refuse_model(model)
    endings = adapter.linear_names if config.include is None else config.include
    found, used = [], set()
    for name, module in model.named_modules():
        matched = [e for e in endings if adapter.is_linear_site(name, (e,))]
        if not matched:
            continue
        _check_linear(name, module)
        used.update(matched)
        dropped = [e for e in config.exclude if name == e or name.endswith("." + e)]
        used.update(dropped)
        if not dropped:
            found.append(name)
    if config.include is not None and (missing := [e for e in config.include if e not in used]):
        raise expected("include", f"endings of linears in {adapter.linear_within} of {type(model).__name__}", missing)
    if missing := [e for e in config.exclude if e not in used]:
        raise expected("exclude", "endings of linears that would be quantized", missing)
    if not found:
        raise expected("linear", f"at least one linear of {type(model).__name__} to quantize", "none")
    return found


def with_table(model: nn.Module, adapter: Adapter, config: SVDQuant) -> SVDQuant:
    """`config` with the adapter's table written out, so that a checkpoint outlives a change of the table."""
    if config.include is not None:
        return config
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    used = [e for e in adapter.linear_names if any(adapter.is_linear_site(name, (e,)) for name in names)]
    return dataclasses.replace(config, include=tuple(used))


def _refuse_model(model: nn.Module) -> None:
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    method = method or getattr(model, "quantization_method", None)
    if method is not None and method != METHOD:
        raise ValueError(f"linear: expected a model without a quantizer, got {type(model).__name__} under "
                         f"{getattr(method, 'value', method)!r}; load it without quantization_config")
    if getattr(model, "peft_config", None):
        raise ValueError(f"linear: expected a model without LoRA adapters, got {sorted(model.peft_config)}; fuse them "
                         "into the weights (fuse_lora, then unload_lora_weights) or take them off before patching")


def _check_linear(name: str, module: nn.Module) -> None:
    """A plain nn.Linear whose weight is a plain floating tensor."""
    if hasattr(module, "base_layer"):
        raise ValueError(f"linear: {name} is wrapped by {type(module).__name__} (LoRA); fuse or unload it first")
    if type(module) is not nn.Linear:
        raise expected(f"linear: {name}", "torch.nn.Linear", f"{type(module).__module__}.{type(module).__name__}")
    if not module.weight.is_floating_point() or type(module.weight.data) is not torch.Tensor:
        raise expected(f"linear: {name}.weight", "a plain floating tensor",
                       f"{type(module.weight.data).__name__} of {module.weight.dtype}")


def _quantized(linear: nn.Linear, config: SVDQuant, activations) -> nn.Module:
    from triskele.nn import SVDQuantLinear

    if linear.weight.is_meta:
        return SVDQuantLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, config=config,
                              device="meta", dtype=linear.weight.dtype).train(linear.training)
    return SVDQuantLinear.from_linear(linear, activations=activations, config=config).train(linear.training)


def _follow(linear: nn.Linear, quantized: nn.Module) -> None:
    """Move the linear that is put back to where the model has gone while it was replaced."""
    if not (linear.weight.is_meta or quantized.qweight.is_meta):  # meta: no values here, or offloaded ones
        linear.to(quantized.qweight.device)


def backend_of(linear: nn.Module) -> tuple[str, tuple[str, ...]]:
    """(backend, reasons of those before it) for an SVDQuantLinear; none while it is on the meta device."""
    from triskele.ops.svdq.backends import OP_OF_ACTIVATION

    if linear.qweight.is_meta:
        return "", ()
    dtype = linear.compute_dtype if linear.bias is None else linear.bias.dtype
    x = torch.zeros(1, linear.in_features, device=linear.qweight.device, dtype=dtype)
    inputs = (x, linear.qweight, linear.wscales, linear.wtscale, linear.lora_down, linear.lora_up, linear.smooth,
              linear.bias, linear.format, linear.activation, linear.shift, "none")
    return answer(explain(OP_OF_ACTIVATION[linear.activation], *inputs, backend=linear.backend))


def _progress(model: nn.Module, names: list[str]):
    from tqdm.auto import tqdm

    total = sum(model.get_submodule(name).weight.numel() for name in names)
    meta = next(model.parameters()).is_meta
    return tqdm(total=total, desc="SVDQuant", unit="weight", unit_scale=True, disable=meta or total < PROGRESS_ELEMENTS)


def collect_activations(model: nn.Module, names: Iterable[str], run: Callable[[], object], *, tokens: int = 512,
                        seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of the linears `names` while `run()` runs: name -> [at most `tokens`, K], float32 on the model's device.

    A uniform sample of all tokens that came by, whatever their number; a quarter of the places is kept for the tokens
    with the largest values, which is what smoothing follows. Memory: `tokens` rows a linear.

    names  as `sites` gives them; run: generates with a few prompts, say
    Raises ValueError for a name that is no module, or that `run()` never called.
    """
    check_int("tokens", tokens, low=4)
    modules = dict(model.named_modules())
    samples = {}
    for name in names:
        if name not in modules:
            raise expected("names", f"modules of {type(model).__name__}", name)
        samples[name] = _Sample(tokens, seed)
    hooks = [modules[name].register_forward_pre_hook(sample.see) for name, sample in samples.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [name for name, sample in samples.items() if sample.largest is None]:
        raise expected("run", "to call every linear", f"no call of {unseen[:4]}")
    return {name: sample.rows() for name, sample in samples.items()}


class _Sample:
    """A bounded sample of rows: those with the largest values, and a uniform one (the smallest of random keys)."""

    def __init__(self, tokens: int, seed: int):
        self.top = tokens // 4
        self.uniform = tokens - self.top
        self.generator = torch.Generator().manual_seed(seed)
        self.largest = self.drawn = self.keys = None

    def see(self, _module, args) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        keys = torch.rand(len(rows), generator=self.generator, dtype=torch.float64).to(rows.device)
        if self.largest is not None:
            self.keys, order = torch.cat([self.keys, keys]).topk(
                min(self.uniform, len(self.keys) + len(keys)), largest=False)
            self.drawn = torch.cat([self.drawn, rows])[order]
            rows = torch.cat([self.largest, rows])
        else:
            self.keys, order = keys.topk(min(self.uniform, len(keys)), largest=False)
            self.drawn = rows[order]
        self.largest = rows[rows.abs().amax(1).topk(min(self.top, len(rows))).indices]

    def rows(self) -> torch.Tensor:
        return torch.cat([self.drawn, self.largest])
