"""The model families that `patch` knows: one module a family, each with an `ADAPTER`. Adding one touches one file.

Models are recognised by class name, so that this package imports without diffusers and a family that an installed
diffusers does not have costs nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache

from triskele.diffusers.interface import Adapter

REFUSED = {
    "CogVideoXTransformer3DModel": "no adapter yet: text and video tokens are joined, and its guidance calls t.item()",
    "SD3Transformer2DModel": "no adapter yet: image tokens come before the text; some blocks have a second attention",
    "ZImageTransformer2DModel": "no adapter yet: it reads .weight of its linears and truncates tokens by index",
    "HunyuanVideoTransformer3DModel": "no adapter yet: joint attention with a mask, and a text-only refiner",
    "LTXVideoTransformer3DModel": "no adapter yet",
    "QwenImageTransformer2DModel": "no adapter yet: joint attention with a mask over text",
    "Flux2Transformer2DModel": "no adapter yet: query, key, value and MLP share one linear",
    "SanaTransformer2DModel": "its self-attention is linear already",
    "MochiTransformer3DModel": "no adapter yet: joint attention that drops text by index",
    "WanVACETransformer3DModel": "no adapter yet: its control blocks run beside the main ones",
    "UNet3DConditionModel": "no adapter yet: spatial and temporal attention alternate",
    "UNetSpatioTemporalConditionModel": "no adapter yet: spatial and temporal attention alternate",
    "UNet2DModel": "no adapter yet: unconditional, with the older attention blocks",
}
"""Known models that are refused, and why."""


@dataclass(frozen=True)
class SupportRow:
    """A line of `supported()`: "yes", or "refused: reason", for each arm."""

    family: str
    classes: tuple[str, ...]
    attention: str
    linear: str
    sampler: str


class SupportTable(tuple):
    """The rows of `supported()`; prints as a table."""

    def __str__(self) -> str:
        lines = [f"{'family':<10}{'attention':<12}{'linear':<12}{'sampler':<12}classes"]
        refused = []
        for row in self:
            if row.family == "-":
                refused.append(f"  {row.classes[0]}: {row.attention.removeprefix('refused: ')}")
                continue
            cells = {arm: getattr(row, arm) for arm in ("attention", "linear", "sampler")}
            short = "".join(f"{cell.split(':')[0]:<12}" for cell in cells.values())
            lines.append(f"{row.family:<10}{short}{', '.join(row.classes)}")
            refused += [f"  {row.family}, {arm}: {cell.removeprefix('refused: ')}"
                        for arm, cell in cells.items() if cell != "yes"]
        return "\n".join([*lines, *(["refused:", *refused] if refused else [])])

    __repr__ = __str__


@cache
def adapters() -> tuple[Adapter, ...]:
    """Every family's adapter, found by listing this folder."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").ADAPTER for name in names)


def adapter_for(model) -> Adapter:
    """The adapter of a model. ValueError, with the reason and the list of what is supported, when there is none."""
    names = [cls.__name__ for cls in type(model).__mro__]
    for adapter in adapters():
        if any(name in adapter.model_classes for name in names):
            return adapter
    known = ", ".join(sorted(name for adapter in adapters() for name in adapter.model_classes))
    reason = next((f" ({REFUSED[name]})" for name in names if name in REFUSED), "")
    raise ValueError(f"target: {names[0]} is not supported{reason}; expected one of {known}")


def supported() -> SupportTable:
    """Which families each arm takes, and the known models that are refused with their reasons."""
    rows = []
    for adapter in adapters():
        attention = f"refused: {adapter.attention}" if isinstance(adapter.attention, str) else "yes"
        linear = f"refused: {adapter.linear_names}" if isinstance(adapter.linear_names, str) else "yes"
        sampler = "yes" if adapter.pipelines else "refused: no pipeline of this family has been tried"
        rows.append(SupportRow(adapter.family, adapter.model_classes, attention, linear, sampler))
    rows += [SupportRow("-", (name,), *[f"refused: {reason}"] * 3) for name, reason in sorted(REFUSED.items())]
    return SupportTable(rows)


def supported_arms(target) -> dict[str, str | None]:
    """arm -> None where it takes this pipeline or model, else the reason why not."""
    from triskele.diffusers.patch import models_of

    try:
        models, pipe = models_of(target)
        chosen = [adapter_for(model) for model in models.values()]
    except ValueError as error:
        return dict.fromkeys(("attention", "linear", "sampler"), str(error))
    adapter = chosen[0]
    arms = {"attention": None, "linear": None, "sampler": None}
    if isinstance(adapter.attention, str):
        arms["attention"] = adapter.attention
    else:
        arms["attention"] = next((why for model in models.values() if (why := adapter.attention.refuse(model))), None)
    if isinstance(adapter.linear_names, str):
        arms["linear"] = adapter.linear_names
    if pipe is None:
        arms["sampler"] = "a model by itself has no denoising loop"
    elif type(pipe).__name__ not in adapter.pipelines:
        arms["sampler"] = f"{type(pipe).__name__} has not been tried; expected one of {adapter.pipelines}"
    else:
        arms["sampler"] = adapter.sampler_refusal(pipe)
    return arms
