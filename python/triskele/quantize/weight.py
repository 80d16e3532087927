"""SVDQWeight: the weight of one linear layer as 4-bit residual plus low-rank branch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from triskele.checks import check_choice, check_same, check_shape, check_tensor, expected
from triskele.quantize.formats import ACTIVATIONS, FORMATS, dequantize, group_size, unpack_nibbles
from triskele.quantize.scales import are_integer


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all()):
        raise expected(name, "finite values", "NaN or infinity")


@dataclass(frozen=True, eq=False)
class SVDQWeight:
    """W diag(smooth) = R + lora_up (lora_down diag(smooth)), R = code * scale in 4 bits.

    qweight      uint8 [N, K'/2], K' = K rounded up to the group; column 2i in the low nibble of byte i
    wscales      [N, K'/group], any floating dtype (float8_e4m3fn for nvfp4)
    lora_down    [r, K]: applies to x as it is (already divided by smooth); lora_up [N, r]
    smooth       [K], positive: the residual sees x / smooth
    in_features  K
    format       "int4" or "nvfp4"; activation: how x / smooth is quantized when the layer runs
    wtscale      nvfp4: float32 [1], or [N] where parts with their own tensor scale were stacked
    shift        added to x before it is quantized (0.171875 after GELU, so that codes can be unsigned); the layer's
                 bias must then hold `shift_bias()` as well: `svdq_linear` and `SVDQuantLinear` see to it
    report       what calibration found, where it ran
    """

    qweight: torch.Tensor
    wscales: torch.Tensor
    lora_down: torch.Tensor
    lora_up: torch.Tensor
    smooth: torch.Tensor
    in_features: int
    format: str = "int4"
    activation: str = "int8"
    wtscale: torch.Tensor | None = None
    shift: float = 0.0
    report: object = field(default=None, repr=False)

    def __post_init__(self):
        check_choice("format", self.format, FORMATS)
        check_choice("activation", self.activation, ACTIVATIONS)
        for name in ("qweight", "wscales", "lora_down", "lora_up"):
            check_tensor(name, getattr(self, name), dim=2, floating=name != "qweight")
        check_tensor("smooth", self.smooth, dim=1, floating=True)
        if self.qweight.dtype != torch.uint8:
            raise expected("qweight", "dtype torch.uint8", self.qweight.dtype)
        n, k, groups = self.qweight.shape[0], self.in_features, self.wscales.shape[1]
        if groups < 1 or self.qweight.shape[1] * 2 % groups:
            raise expected("wscales", "a number of groups that divides qweight's columns", list(self.wscales.shape))
        group_size(self.format, self.group)
        check_shape("qweight", self.qweight, (None, -(-k // self.group) * self.group // 2))
        check_shape("wscales", self.wscales, (n, groups))
        check_shape("lora_down", self.lora_down, (None, k))
        check_shape("lora_up", self.lora_up, (n, self.lora_down.shape[0]))
        check_shape("smooth", self.smooth, (k,))
        if (self.wtscale is not None) != (self.format == "nvfp4"):
            raise expected("wtscale", "a tensor with nvfp4 and None with int4", type(self.wtscale).__name__)
        if self.wtscale is not None:
            check_tensor("wtscale", self.wtscale, dim=1, floating=True)
            if self.wtscale.shape[0] not in (1, n):
                raise expected("wtscale", f"shape [1] or [{n}]", list(self.wtscale.shape))
        if not 0 <= self.shift < float("inf"):
            raise expected("shift", "a finite number >= 0", self.shift)
        for name in ("wscales", "lora_down", "lora_up", "smooth", "wtscale"):
            if getattr(self, name) is not None:
                check_same(name, getattr(self, name), self.qweight, "qweight", dtype=False)
                _check_finite(name, getattr(self, name))
        if not self.smooth.is_meta and bool((self.smooth <= 0).any()):
            raise expected("smooth", "positive values", float(self.smooth.min()))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.qweight.shape[0], self.in_features

    @property
    def rank(self) -> int:
        return self.lora_down.shape[0]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.qweight.shape[1] * 2 // self.wscales.shape[1]

    def has_integer_scales(self) -> bool:
        """Whether each channel's scales are multiples 1 … 18 of one number, as `scales="integer"` makes them."""
        return self.format == "int4" and are_integer(self.wscales)

    @property
    def codes(self) -> torch.Tensor:
        """[N, K]: int8 -7 … 7 for int4; e2m1 codes 0 … 15 in uint8 for nvfp4."""
        return unpack_nibbles(self.qweight, self.format)[:, :self.in_features]

    @property
    def scales(self) -> torch.Tensor:
        """float32 [N, K'/group], without the tensor scale."""
        return self.wscales.float()

    @property
    def tensor_scale(self) -> torch.Tensor | None:
        return self.wtscale

    def dequantize(self) -> torch.Tensor:
        """R, the 4-bit residual in smoothed space: float64 [N, K]."""
        return dequantize(self.codes, self.wscales.double(), self.wtscale, self.format, self.group)

    def effective_weight(self) -> torch.Tensor:
        """The weight that the layer applies to x: R / smooth + lora_up lora_down, float64 [N, K]."""
        return self.dequantize() / self.smooth.double() + self.lora_up.double() @ self.lora_down.double()

    def shift_bias(self) -> torch.Tensor:
        """What the bias must absorb because R sees x + shift: -shift * sum_k R[n, k] / smooth[k], float64 [N]."""
        return -self.shift * (self.dequantize() / self.smooth.double()).sum(1)

    def to(self, device) -> SVDQWeight:
        """A copy on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)
                 if isinstance(getattr(self, f.name), torch.Tensor)}
        return dataclasses.replace(self, **moved)

    def split(self, sizes) -> list[SVDQWeight]:
        """Rows cut into parts that share smooth and lora_down (q, k and v quantized as one weight)."""
        if sum(sizes) != self.shape[0] or any(s < 0 for s in sizes):
            raise expected("sizes", f"sizes that add up to {self.shape[0]}", list(sizes))
        stacked = self.wtscale is not None and self.wtscale.shape[0] != 1
        parts = []
        for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes):
            rows = slice(start, start + size)
            parts.append(dataclasses.replace(
                self, qweight=self.qweight[rows], wscales=self.wscales[rows], lora_up=self.lora_up[rows],
                wtscale=self.wtscale[rows] if stacked else self.wtscale))
        return parts

    def memory_bytes(self) -> int:
        tensors = (self.qweight, self.wscales, self.lora_down, self.lora_up, self.smooth, self.wtscale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
