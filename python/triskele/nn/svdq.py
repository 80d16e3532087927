"""SVDQuantLinear: an nn.Linear whose weight is 4 bits and a low-rank branch."""

from __future__ import annotations

import torch
from torch import nn

from triskele.backend import NAMES
from triskele.checks import check_choice, check_int, check_shape, check_tensor, expected
from triskele.configs import SVDQuant
from triskele.ops.svdq.op import svdq_linear_op
from triskele.ops.svdq.reference import EPILOGUES, weight_float64
from triskele.quantize.formats import group_size
from triskele.quantize.svdquant import svd_quantize
from triskele.quantize.weight import SVDQWeight

_BUFFERS = ("qweight", "wscales", "lora_down", "lora_up", "smooth", "wtscale")
STORAGE = torch.bfloat16  # of scales and factors: 16 bits, and the range of float32


class _Dequantized(torch.Tensor):
    """A tensor in every way but one: assigning to its `data` is an error.

    That is how adapters merge themselves into a linear (`linear.weight.data += delta`); here they would be lost unsaid.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self):
        return super().data

    @data.setter
    def data(self, _value):
        raise RuntimeError("SVDQuantLinear.weight: nothing can be merged into a 4-bit weight; keep the adapter beside "
                           "it, or fuse it before quantizing")


class SVDQuantLinear(nn.Linear):
    """y = quant(x / smooth) R^T + (x lora_down^T) lora_up^T + bias, the 4-bit form of y = x W^T + bias.

    A subclass of nn.Linear, so that LoRA injection, layerwise casting and offloading know it; `in_features`,
    `out_features` and `bias` are as there. State: `qweight` uint8 [N, K'/2], `wscales` [N, K'/group], `lora_down`
    [r, K], `lora_up` [N, r], `smooth` [K], `wtscale` [1] (nvfp4), `bias` [N]; r = min(rank, N, K).

    - `.to(dtype)`, `.half()` and their like cast the bias alone. Scales and factors keep the dtype that they were made
      in (bfloat16, so that a loader that does cast them to bfloat16 changes nothing); the result has x's dtype.
    - `weight` is a property: the dequantized weight, made anew at each access, for code that reads its dtype, device or
      values. Assigning to it or to its `data` is an error (merging a LoRA, say); writing into it changes nothing.
    - It trains nothing but its bias; gradients pass through to x. `state_dict` round-trips, also into a module made on
      the meta device (`load_state_dict(..., assign=True)`, or `to_empty` first).

    bias    True, False; config: rank, format, activation and backend are used
    shift   see SVDQWeight: the bias stored here has absorbed it
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: SVDQuant | None = None, *,
                 group: int = 64, shift: float = 0.0, device=None, dtype=None):
        nn.Module.__init__(self)  # not Linear's: it would make the full weight
        check_int("in_features", in_features, low=1)
        check_int("out_features", out_features, low=1)
        config = SVDQuant() if config is None else config
        self.in_features, self.out_features = in_features, out_features
        self._set(config.format, config.activation, shift, config.backend)
        group = group_size(config.format, group)
        groups = -(-in_features // group)
        rank = min(config.rank, in_features, out_features)
        self.compute_dtype = dtype or torch.get_default_dtype()
        scales = torch.float8_e4m3fn if config.format == "nvfp4" else STORAGE
        shapes = {"qweight": ((out_features, groups * group // 2), torch.uint8),
                  "wscales": ((out_features, groups), scales), "lora_down": ((rank, in_features), STORAGE),
                  "lora_up": ((out_features, rank), STORAGE), "smooth": ((in_features,), STORAGE)}
        if config.format == "nvfp4":
            shapes["wtscale"] = ((1,), torch.float32)
        for name in _BUFFERS:
            shape, kind = shapes.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=self.compute_dtype, device=device)) if bias else None
        self.reset_parameters()

    def _set(self, format: str, activation: str, shift: float, backend: str) -> None:
        check_choice("backend", backend, ("auto", *NAMES))
        self.format, self.activation, self.shift, self.backend = format, activation, float(shift), backend

    @classmethod
    def from_quantized(cls, weight: SVDQWeight, bias: torch.Tensor | None = None, *, backend: str = "auto",
                       dtype=None) -> SVDQuantLinear:
        """The module that holds `weight`'s tensors (not copies); bias [N] as `svdq_linear` takes it.

        dtype: of the bias and of `weight`; None: the bias's, or that of the factors.
        """
        if not isinstance(weight, SVDQWeight):
            raise expected("weight", "an SVDQWeight", type(weight).__name__)
        n, k = weight.shape
        if bias is not None:
            check_tensor("bias", bias, floating=True)
            check_shape("bias", bias, (n,))
        if dtype is None:
            dtype = weight.lora_up.dtype if bias is None else bias.dtype
        if weight.shift:
            bias = weight.shift_bias() + (0 if bias is None else bias.detach().double())
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.in_features, module.out_features, module.compute_dtype = k, n, dtype
        module._set(weight.format, weight.activation, weight.shift, backend)
        for name in _BUFFERS:
            module.register_buffer(name, getattr(weight, name))
        device = weight.qweight.device
        module.bias = None if bias is None else nn.Parameter(bias.detach().to(device=device, dtype=dtype, copy=True))
        return module

    @classmethod
    def from_linear(cls, linear: nn.Linear, activations: torch.Tensor | None = None, config: SVDQuant | None = None, *,
                    compute_device=None, **options) -> SVDQuantLinear:
        """Quantize `linear`; its own tensors are left as they are.

        activations     [..., K]: inputs to calibrate on; config.smooth: whether to search smoothing with them
        compute_device  where the SVDs run; None: where the weight is. The module is on the weight's device
        options         further arguments of `svd_quantize`; config.rank is capped at min(N, K) here
        """
        if not isinstance(linear, nn.Linear):
            raise expected("linear", "an nn.Linear", type(linear).__name__)
        config = SVDQuant() if config is None else config
        home, weight = linear.weight.device, linear.weight.detach()
        if weight.is_meta:
            raise expected("linear", "a weight with data", "one on the meta device")
        quantized = svd_quantize(
            weight.to(compute_device or home), activations, **{
                "rank": min(config.rank, *weight.shape), "format": config.format, "activation": config.activation,
                "scales": config.scales, "smooth": "search" if config.smooth else None, "iterations": config.iterations,
                "dtype": STORAGE, **options})
        module = cls.from_quantized(quantized.to(home), linear.bias, backend=config.backend, dtype=weight.dtype)
        return module.train(linear.training)

    def to_quantized(self) -> tuple[SVDQWeight, torch.Tensor | None]:
        """(SVDQWeight, bias) that `from_quantized` takes; the shift is taken back out of the bias."""
        weight = SVDQWeight(*(getattr(self, name) for name in _BUFFERS[:-1]), self.in_features, self.format,
                            self.activation, self.wtscale, self.shift)
        bias = None if self.bias is None else self.bias.detach()
        if bias is not None and self.shift:
            bias = (bias.double() - weight.shift_bias()).to(bias.dtype)
        return weight, bias

    @property
    def rank(self) -> int:
        return self.lora_down.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """R / smooth + lora_up lora_down in the module's dtype: [N, K], made anew at each access."""
        dtype = self.compute_dtype if self.bias is None else self.bias.dtype
        if self.qweight.is_meta:
            whole = torch.empty(self.out_features, self.in_features, device="meta")
        else:
            residual = weight_float64(self.qweight, self.wscales, self.wtscale, self.in_features, self.format)
            whole = residual / self.smooth.double() + self.lora_up.double() @ self.lora_down.double()
        return whole.to(dtype).as_subclass(_Dequantized)

    def forward(self, input: torch.Tensor, *, epilogue: str = "none") -> torch.Tensor:
        """y, or GELU(y) in the same pass: "none", "gelu", "gelu_tanh" (`svdq_linear`)."""
        check_choice("epilogue", epilogue, tuple(EPILOGUES))
        if input.shape[-1] != self.in_features:
            raise expected("input", f"shape [..., {self.in_features}]", list(input.shape))
        return svdq_linear_op(input, self.qweight, self.wscales, self.wtscale, self.lora_down, self.lora_up,
                              self.smooth, self.bias, self.format, self.activation, self.shift, epilogue,
                              self.backend)

    def reset_parameters(self) -> None:
        """The zero map: there is no random 4-bit start."""
        with torch.no_grad():
            for name in ("qweight", "lora_down", "lora_up", "bias"):
                if getattr(self, name) is not None:
                    getattr(self, name).zero_()
            for name in ("wscales", "smooth", "wtscale"):
                if getattr(self, name) is not None:
                    getattr(self, name).fill_(1)

    def memory_bytes(self) -> int:
        """Bytes of the stored state, bias included."""
        return sum(t.numel() * t.element_size() for t in (*self.buffers(), *self.parameters()))

    def extra_repr(self) -> str:
        text = (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"rank={self.rank}, format={self.format}, activation={self.activation}")
        return text + (f", shift={self.shift}" if self.shift else "")

    def _apply(self, fn, recurse=True):
        own = {id(b) for b in self._buffers.values() if b is not None}

        def keep_dtype(tensor):
            out = fn(tensor)
            if id(tensor) in own and out.dtype != tensor.dtype:
                return tensor.to(out.device)  # moved, not cast
            return out

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """Scales and factors take the checkpoint's dtype; values that are not finite are errors."""
        for name in _BUFFERS[1:]:
            new, old = state_dict.get(prefix + name), getattr(self, name)
            if not isinstance(new, torch.Tensor) or old is None:
                continue
            if not new.is_floating_point():
                errors.append(f"{prefix}{name}: expected a floating-point dtype, got {new.dtype}")
                continue
            if not new.is_meta and not bool(torch.isfinite(new.float()).all()):
                errors.append(f"{prefix}{name}: expected finite values, got NaN or infinity")
            elif name == "smooth" and not new.is_meta and bool((new <= 0).any()):
                errors.append(f"{prefix}{name}: expected positive values, got {float(new.min())}")
            one_a_row = name == "wtscale" and new.shape == (self.out_features,)
            if new.dtype != old.dtype or (one_a_row and new.shape != old.shape):
                shape = new.shape if one_a_row else old.shape
                self._buffers[name] = old.to(new.dtype).expand(shape).contiguous()
        qweight = state_dict.get(prefix + "qweight")
        if isinstance(qweight, torch.Tensor) and qweight.dtype != torch.uint8:
            errors.append(f"{prefix}qweight: expected dtype torch.uint8, got {qweight.dtype}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
