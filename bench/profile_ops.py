"""Where a model's time goes: torch's operator profile, grouped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

GROUPS = {  # group -> beginnings of the operators' names; the first that fits counts
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::scaled_dot", "triskele_native::sla",
                  "triskele_native::vmoba", "triskele::sla", "triskele::vmoba"),
    "linear": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear", "aten::mkldnn_linear", "triskele_native::svdq",
               "triskele::svdq", "aten::matmul"),
    "GELU": ("aten::gelu", "triskele_native::gelu"),
    "norms, modulation, gates": ("aten::native_layer_norm", "aten::layer_norm", "aten::rms_norm", "aten::_fused_rms",
                                 "aten::pow", "aten::mean", "aten::rsqrt", "aten::sum", "aten::div", "triskele::adaln",
                                 "triskele_native::adaln", "triskele::gate", "triskele_native::gate"),
    "rotary, products, sums": ("aten::mul", "aten::add", "aten::sub", "aten::cat", "aten::stack"),
    "copies, casts": ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::to", "aten::fill_"),
}
OTHER = "rest"


def group_of(name: str) -> str:
    return next((group for group, starts in GROUPS.items() if name.startswith(starts)), OTHER)


def milliseconds_by_group(call: Callable[[], object]) -> dict[str, float]:
    """Self time on the calling thread of one call, by group; one call before it warms up."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    times = dict.fromkeys((*GROUPS, OTHER), 0.0)
    for event in found.key_averages():
        times[group_of(event.key)] += event.self_cpu_time_total / 1e3
    return times


def of_module(model: torch.nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds by group of one forward of `model`, on the arguments of its first call in `run`."""
    caught: list[tuple] = []

    def catch(_module, args, kwargs):
        caught.append((args, kwargs))

    hook = model.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    args, kwargs = caught[0]
    with torch.no_grad():
        return milliseconds_by_group(lambda: model(*args, **kwargs))
