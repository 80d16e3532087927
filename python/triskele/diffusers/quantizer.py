"""The diffusers quantizer "triskele": it saves a patched model's config and, on loading, puts the arms back.

    config.json      "quantization_config": {"quant_method": "triskele", "linear": {...}, "attention": {...}}
    from_pretrained  model on the meta device -> attention and linear arms -> weights, in the dtypes in which they were
                     saved -> nothing may be left without a value

Given to `from_pretrained` of a plain folder (`quantization_config=TriskeleConfig(...)`), the weights are loaded first
and the arms are applied to them. diffusers knows the method once `triskele.diffusers` has been imported.
"""

from __future__ import annotations

import logging
from enum import Enum

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from triskele.checks import expected
from triskele.configs import SLA, SVDQuant, VMoBA
from triskele.diffusers import attention as attention_arm
from triskele.diffusers import linear as linear_arm
from triskele.diffusers.adapters import adapter_for
from triskele.diffusers.undo import UndoLog

logger = logging.getLogger("triskele")

PACKED = ("qweight", "wscales", "lora_down", "lora_up", "smooth", "wtscale")
"""State of an SVDQuantLinear that is loaded as it was saved, whatever `torch_dtype` says."""


class Method(str, Enum):
    """diffusers asks a config's `quant_method` for its `.value`."""

    TRISKELE = linear_arm.METHOD


class TriskeleConfig(QuantizationConfigMixin):
    """What a model carries of triskele: the linear and attention arms' configs (or their `to_dict()`).

    Raises ValueError when both are None, and for a dict that no config of the arm takes.
    """

    def __init__(self, linear: SVDQuant | dict | None = None, attention: SLA | VMoBA | dict | None = None,
                 quant_method: str = Method.TRISKELE):
        if quant_method != Method.TRISKELE:
            raise expected("quant_method", repr(Method.TRISKELE.value), repr(quant_method))
        self.quant_method = Method.TRISKELE
        self.linear = _config("linear", linear, (SVDQuant,))
        self.attention = _config("attention", attention, (SLA, VMoBA))
        if self.linear is None and self.attention is None:
            raise expected("TriskeleConfig", "linear=, attention= or both", "neither")

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """Inverse of `to_dict`; an unknown key is a ValueError."""
        values = {**config_dict, **kwargs}
        if unknown := sorted(set(values) - {"linear", "attention", "quant_method"}):
            raise expected("quantization_config keys", ["attention", "linear", "quant_method"], unknown)
        config = cls(**values)
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        """Plain values that JSON holds."""
        return {"quant_method": self.quant_method.value,
                "linear": None if self.linear is None else self.linear.to_dict(),
                "attention": None if self.attention is None else self.attention.to_dict()}

    def to_diff_dict(self) -> dict:
        """`to_dict` without what is not set."""
        return {key: value for key, value in self.to_dict().items() if value is not None}

    def __iter__(self):
        yield from self.to_dict().items()


def _config(arm: str, value, classes):
    if value is None or isinstance(value, classes):
        return value
    if not isinstance(value, dict):
        raise expected(arm, " or ".join(cls.__name__ for cls in classes) + ", or its to_dict()", repr(value))
    by_name = {cls.__name__: cls for cls in classes}
    kind = value.get("kind", classes[0].__name__)
    if kind not in by_name:
        raise expected(f"{arm}['kind']", f"one of {tuple(by_name)}", repr(kind))
    return by_name[kind].from_dict(value)


class TriskeleQuantizer(DiffusersQuantizer):
    """diffusers' side of saving and loading."""

    use_keep_in_fp32_modules = True  # a model's own rule for the weights that are not quantized

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._undo = UndoLog()  # never rolled back: what is loaded is the model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """The 4-bit weights are constants; sparse attention by itself trains."""
        return self.quantization_config.linear is None

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *_args, device_map=None, **_kwargs) -> None:
        spread = isinstance(device_map, dict) and len(set(device_map.values())) > 1
        if spread and not self.pre_quantized:
            raise expected("device_map", "one device for a model that is quantized while it is loaded (save it, and "
                           "load that)", device_map)

    def update_missing_keys(self, model, missing_keys: list[str], prefix: str) -> list[str]:
        """Called before a weight is read: a checkpoint that lacks one is refused."""
        if self.pre_quantized and missing_keys:
            raise ValueError(f"{type(model).__name__}: the checkpoint lacks {_some(missing_keys)}, which its "
                             "quantization_config asks for; nothing was loaded")
        return missing_keys

    def check_if_quantized_param(self, model, param_value, param_name: str, state_dict, **_kwargs) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return leaf in PACKED and hasattr(model.get_submodule(owner), "qweight")

    def check_quantized_param_shape(self, param_name, current_param, loaded_param) -> bool:
        raise expected(param_name, f"shape {list(current_param.shape)}", list(loaded_param.shape))

    def create_quantized_param(self, model, param_value, param_name: str, target_device, state_dict, *_args,
                               **_kwargs) -> None:
        """Put a packed tensor in its place, uncast."""
        owner, _, leaf = param_name.rpartition(".")
        module, value = model.get_submodule(owner), state_dict[param_name]
        want = getattr(module, leaf).dtype
        if value.dtype != want and not (value.is_floating_point() and want.is_floating_point):
            raise expected(param_name, f"dtype {want}", value.dtype)
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise expected(param_name, "finite values", "NaN or infinity")
        if leaf == "smooth" and bool((value <= 0).any()):
            raise expected(param_name, "positive values", float(value.min()))
        module._buffers[leaf] = value.to(target_device)

    def _process_model_before_weight_loading(self, model, **_kwargs) -> None:
        if self.pre_quantized:
            self._apply_arms(model)

    def _process_model_after_weight_loading(self, model, **_kwargs):
        if not self.pre_quantized:
            if empty := [name for name, p in model.named_parameters() if p.is_meta]:
                raise ValueError(f"{type(model).__name__}: the checkpoint lacks {_some(empty)}; nothing was quantized")
            self._apply_arms(model)
        named = [*model.named_parameters(), *model.named_buffers()]
        if empty := [name for name, tensor in named if tensor.is_meta]:
            raise ValueError(f"{type(model).__name__}: no values were loaded for {_some(empty)}")
        _mark(model, self.quantization_config, vars(model).__setitem__)
        return model

    def _apply_arms(self, model) -> None:
        adapter, config = adapter_for(model), self.quantization_config
        if config.attention is not None:
            attention_arm.apply(model, adapter, config.attention, self._undo)
        if config.linear is not None:
            linear_arm.apply(model, adapter, config.linear, self._undo)
            config.linear = linear_arm.with_table(model, adapter, config.linear)


def attach_config(model, linear: SVDQuant | None = None, attention: SLA | VMoBA | None = None,
                  undo: UndoLog | None = None) -> None:
    """Make `model.save_pretrained` write what `from_pretrained` needs to bring the patch back.

    A model that was loaded with one arm keeps it in the config when the other one is added. Taken back by `undo`.
    """
    undo = UndoLog() if undo is None else undo
    held = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if held is not None and not isinstance(held, TriskeleConfig):
        raise expected("model", "one without a quantizer of another method", repr(held.quant_method))
    if linear is not None:
        linear = linear_arm.with_table(model, adapter_for(model), linear)
    config = TriskeleConfig(linear or getattr(held, "linear", None), attention or getattr(held, "attention", None))
    undo.setattr(model, "_internal_dict", FrozenDict({**model.config, "quantization_config": config}))
    undo.setattr(model, "hf_quantizer", TriskeleQuantizer(config, pre_quantized=True))
    _mark(model, config, lambda name, value: undo.setattr(model, name, value))


def _mark(model, config: TriskeleConfig, put) -> None:
    """diffusers refuses `.to(dtype)`, `.half()` and the like of a model that is marked: one with sparse attention alone
    may be cast."""
    put("is_quantized", config.linear is not None)
    put("quantization_method", config.quant_method)


def _some(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


AUTO_QUANTIZATION_CONFIG_MAPPING[Method.TRISKELE.value] = TriskeleConfig
AUTO_QUANTIZER_MAPPING[Method.TRISKELE.value] = TriskeleQuantizer
