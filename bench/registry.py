"""Every case, from the files cases_*.py (a CPU's) and gpu_cases.py."""

from __future__ import annotations

import cases_attention
import cases_linear
import cases_sampling
import gpu_cases
from case import Case

FILES = (cases_attention, cases_linear, cases_sampling, gpu_cases)


def cases(which: str = "short", device: str | None = None) -> list[Case]:
    """"short": the shapes with targets. "curves": these, and the points over L, keep, head_dim and M. "dry": those of a
    GPU at sizes that a CPU rehearses.

    device  "cpu" or "cuda": only what means something there
    """
    if which == "dry":
        return gpu_cases.dry()
    found = [case for file in FILES for case in file.short()]
    if which == "curves":
        found += [case for file in FILES for case in file.curves()]
    return [case for case in found if device is None or device in case.devices]
