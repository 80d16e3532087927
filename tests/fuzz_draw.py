"""What a fuzz case is drawn from: sizes around the vectors' edges, and tensors in hostile layouts."""

from __future__ import annotations

import random

import torch

EDGES = tuple(n + d for n in (16, 32, 48, 64, 80, 96, 128, 192, 256, 320, 512) for d in (-1, 0, 1))
OUTLIER, OUTLIERS = 30.0, 0.02
"""How much larger an outlier is, and how many there are where a tensor has them."""


class Draw:
    """A seeded source of choices; `facts` holds each one, for the report of a failure."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.facts: dict[str, object] = {}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.facts.items())

    def choice(self, name: str, options):
        self.facts[name] = value = self.random.choice(list(options))
        return value

    def flag(self, name: str, share: float = 0.5) -> bool:
        self.facts[name] = value = self.random.random() < share
        return value

    def size(self, name: str, high: int, low: int = 1) -> int:
        """low … high: an edge of a vector as often as a small number or any other."""
        kind = self.random.randrange(3)
        edges = [n for n in EDGES if low <= n <= high]
        if kind == 0 and edges:
            value = self.random.choice(edges)
        else:
            value = self.random.randint(low, min(high, low + 8) if kind == 1 else high)
        self.facts[name] = value
        return value

    def share(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        self.facts[name] = value = round(self.random.uniform(low, high), 3)
        return value

    def values(self, *shape, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers in float64, with outliers now and then."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        if self.random.random() < 0.15:
            x = torch.where(torch.rand(shape, generator=self.generator) < OUTLIERS, x * OUTLIER, x)
        return x

    def tensor(self, name: str, *shape, dtype=torch.float32, scale: float = 1.0, expand: bool = True) -> torch.Tensor:
        """Normal numbers in some layout."""
        shape = list(shape)
        wide = None
        if expand and shape and self.random.random() < 0.06:
            wide = self.random.randrange(len(shape))
        drawn = [1 if axis == wide else n for axis, n in enumerate(shape)]
        placed, layout = self.place(self.values(*drawn, scale=scale).to(dtype))
        if wide is not None:
            placed, layout = placed.expand(shape), f"{layout} expanded {wide}"
        self.facts[name] = f"{shape} {str(dtype).removeprefix('torch.')} {layout}"
        return placed

    def bools(self, name: str, *shape, share: float = 0.7) -> torch.Tensor:
        """True with this share, in some layout."""
        placed, layout = self.place(torch.rand(shape, generator=self.generator) < share)
        self.facts[name] = f"{shape} bool {layout}"
        return placed

    def integers(self, name: str, low: int, high: int, *shape, dtype=torch.int8) -> torch.Tensor:
        """low … high, in some layout."""
        drawn = torch.randint(low, high + 1, shape, generator=self.generator).to(dtype)
        placed, layout = self.place(drawn)
        self.facts[name] = f"{shape} {layout}"
        return placed

    def place(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        """The same values with other strides, inside a buffer whose other elements are NaN (or the largest integer)."""
        if x.dim() == 0 or self.random.random() < 0.4:
            return x, "contiguous"
        order = list(range(x.dim()))
        if self.random.random() < 0.5:
            self.random.shuffle(order)
        steps = [self.random.choice((1, 1, 1, 2)) for _ in order]
        before = [self.random.choice((0, 0, 1, 3)) for _ in order]
        after = [self.random.choice((0, 0, 1, 5)) for _ in order]
        sizes = [before[a] + steps[a] * x.shape[a] + after[a] for a in order]
        if x.dtype == torch.bool:
            buffer = torch.ones(sizes, dtype=torch.bool)
        elif x.dtype.is_floating_point:
            buffer = torch.full(sizes, float("nan")).to(x.dtype)
        else:
            buffer = torch.full(sizes, torch.iinfo(x.dtype).max, dtype=x.dtype)
        cut = buffer[tuple(slice(before[a], before[a] + steps[a] * x.shape[a], steps[a]) for a in order)]
        view = cut.permute([order.index(a) for a in range(x.dim())])
        view.copy_(x)
        return view, f"strides {list(view.stride())}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
