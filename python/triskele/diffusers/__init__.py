"""triskele inside diffusers: `patch` a pipeline or a model, and the table of what is `supported`.

Importing this registers triskele's quantizer, through which `from_pretrained` brings a patched model back.
"""

from __future__ import annotations

from triskele.diffusers import quantizer  # noqa: F401  enters the method "triskele"
from triskele.diffusers.adapters import supported, supported_arms
from triskele.diffusers.handle import Handle
from triskele.diffusers.linear import collect_activations
from triskele.diffusers.patch import patch
from triskele.diffusers.quantizer import TriskeleConfig

__all__ = ["Handle", "TriskeleConfig", "collect_activations", "patch", "supported", "supported_arms"]
