"""What `patch` takes: one frozen dataclass an arm. Each works without arguments and converts to and from a dict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Literal

from triskele.backend import NAMES
from triskele.checks import check_choice, check_int, expected


@dataclass(frozen=True)
class _Config:
    def __post_init__(self):
        for f in fields(self):  # JSON gives lists where the configs hold tuples
            object.__setattr__(self, f.name, _tuples(getattr(self, f.name)))

    def to_dict(self) -> dict:
        """Plain values that JSON holds; `from_dict` takes them back."""
        return {"kind": type(self).__name__, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict):
        """Inverse of `to_dict`. An unknown key, or another config's `kind`, is a ValueError."""
        values = dict(values)
        kind = values.pop("kind", cls.__name__)
        if kind != cls.__name__:
            raise expected("kind", repr(cls.__name__), repr(kind))
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise expected("config keys", sorted(known), sorted(unknown))
        return cls(**values)


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _share(name: str, value, *, zero: bool) -> None:
    if not (_is_number(value) and (0 <= value < 1 if zero else 0 < value <= 1)):
        raise expected(name, "a share in " + ("[0, 1)" if zero else "(0, 1]"), repr(value))


def _sized(name: str, value, size: int, want: str) -> None:
    if not isinstance(value, tuple) or len(value) != size:
        raise expected(name, want, repr(value))


def _names(name: str, value) -> None:
    if not isinstance(value, tuple) or not all(isinstance(ending, str) for ending in value):
        raise expected(name, "a tuple of name endings", repr(value))


def _backend(value) -> None:
    check_choice("backend", value, ("auto", *NAMES))


@dataclass(frozen=True)
class SLA(_Config):
    """Sparse-linear attention (arXiv 2509.24006): o = o_sparse + o_linear W^T + b over routed blocks.

    keep, drop     share (or, for keep, number) of key blocks a row that is critical, and share that is negligible
    block_q/k      tokens a block
    feature_map    "softmax", "elu", "relu"; scope "all", "complement", "marginal": what the linear branch covers
    linear         the linear branch: "proj" (learnable W, b, starting at zero: the sparse branch alone until trained),
                   "alpha" (SLA2's learnable mix, starting at 1), or "none"
    skip_layers    attention layers left dense at the beginning and end: (first, last)
    """

    keep: float | int = 0.05
    drop: float = 0.0
    block_q: int = 128
    block_k: int = 64
    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    scope: Literal["all", "complement", "marginal"] = "all"
    linear: Literal["proj", "alpha", "none"] = "proj"
    skip_layers: tuple[int, int] = (0, 0)
    backend: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.keep, int):
            check_int("keep", self.keep, low=1)
            share = 0.0
        else:
            _share("keep", self.keep, zero=False)
            share = self.keep
        _share("drop", self.drop, zero=True)
        if share + self.drop > 1:
            raise expected("keep + drop", "at most 1", share + self.drop)
        check_int("block_q", self.block_q, low=1)
        check_int("block_k", self.block_k, low=1)
        check_choice("feature_map", self.feature_map, ("softmax", "elu", "relu"))
        check_choice("scope", self.scope, ("all", "complement", "marginal"))
        check_choice("linear", self.linear, ("proj", "alpha", "none"))
        _sized("skip_layers", self.skip_layers, 2, "(first, last)")
        for layers in self.skip_layers:
            check_int("skip_layers", layers, low=0)
        _backend(self.backend)


@dataclass(frozen=True)
class VMoBA(_Config):
    """Mixture-of-block attention (arXiv 2506.23858): each query attends to its own and its best chunks.

    chunks        layer l uses partition l mod 3: temporal (frames), spatial (ch, cw), spatio-temporal (ct, ch, cw).
                  None: chosen from the grid, about an eighth of the tokens a chunk
    select, pool  "topk" with "query", "head", "all", or "threshold" with these and "block"
    top_k         one number, or one for each of the three partitions; top_k = 1 is the self chunk alone
    threshold     of the normalised gate mass, for select="threshold"
    dense_layers  first layers left dense; dense_steps: share of the first denoising steps left dense
    """

    chunks: tuple | None = None
    select: Literal["topk", "threshold"] = "topk"
    pool: Literal["query", "block", "head", "all"] = "query"
    top_k: int | tuple[int, int, int] = 3
    threshold: float = 0.25
    dense_layers: int = 0
    dense_steps: float = 0.0
    backend: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        check_choice("select", self.select, ("topk", "threshold"))
        check_choice("pool", self.pool, ("query", "block", "head", "all"))
        if self.select == "topk" and self.pool == "block":
            raise expected("pool with select='topk'", "'query', 'head' or 'all'", "'block'")
        if self.chunks is not None:
            _sized("chunks", self.chunks, 3, "one each: temporal, spatial, spatio-temporal")
        if isinstance(self.top_k, tuple):
            _sized("top_k", self.top_k, 3, "a number, or one for each of the three partitions")
        for k in self.top_k if isinstance(self.top_k, tuple) else (self.top_k,):
            check_int("top_k", k, low=1)
        _share("threshold", self.threshold, zero=False)
        check_int("dense_layers", self.dense_layers, low=0)
        _share("dense_steps", self.dense_steps, zero=True)
        _backend(self.backend)


@dataclass(frozen=True)
class SVDQuant(_Config):
    """4-bit weights with a low-rank branch (arXiv 2411.05007) for the linears of the transformer blocks.

    rank        of the low-rank branch; format "int4" (groups of 64) or "nvfp4" (groups of 16)
    activation  "int8" per token, "int4" per token and group, "fp8" per token, "none" (weight only)
    scales      "amax" (published), or for int4 "integer": small multiples of one scale an output channel
    include     name endings to quantize in place of the model's own table; exclude: endings left alone
    iterations  rounds of the low-rank/quantize alternation; smooth: search smoothing where activations are given
    """

    rank: int = 32
    format: Literal["int4", "nvfp4"] = "int4"
    activation: Literal["int8", "int4", "fp8", "none"] = "int8"
    scales: Literal["amax", "integer"] = "amax"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    iterations: int = 10
    smooth: bool = True
    backend: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        check_int("rank", self.rank, low=0)
        check_choice("format", self.format, ("int4", "nvfp4"))
        check_choice("activation", self.activation, ("int8", "int4", "fp8", "none"))
        check_choice("scales", self.scales, ("amax", "integer"))
        if self.scales == "integer" and self.format != "int4":
            raise expected(f"scales with format={self.format!r}", "'amax'", "'integer'")
        if self.include is not None:
            _names("include", self.include)
        _names("exclude", self.exclude)
        check_int("iterations", self.iterations, low=1)
        check_choice("smooth", self.smooth, (True, False))
        _backend(self.backend)


@dataclass(frozen=True)
class ParaTAA(_Config):
    """Parallel sampling (arXiv 2402.09970): `window` timesteps of the denoiser in one batched call.

    window      rows a round; "auto": measured on the first call (a row against a window), with one line saying when
                sequential is faster; None: all steps
    order       of the unrolled equations, None: the window; memory: differences of the Anderson step plus one
    tolerance   of a row's residual, in units of the denoiser's output (criterion "step") or absolute ("rms")
    predictor   how a row that enters the window is guessed: "velocity" (extrapolated) or "copy" (published)
    """

    window: int | Literal["auto"] | None = "auto"
    order: int | None = None
    memory: int = 2
    tolerance: float = 1e-3
    criterion: Literal["step", "rms"] = "step"
    predictor: Literal["velocity", "copy"] = "velocity"
    ridge: float = 1e-3
    ridge_mode: Literal["relative", "absolute"] = "relative"
    max_iterations: int | None = None
    backend: str = "auto"

    def __post_init__(self):
        super().__post_init__()
        if self.window not in ("auto", None):
            check_int("window", self.window, low=1)
        if self.order is not None:
            check_int("order", self.order, low=1)
        check_int("memory", self.memory, low=1)
        if not (_is_number(self.tolerance) and self.tolerance > 0):
            raise expected("tolerance", "a positive number", repr(self.tolerance))
        check_choice("criterion", self.criterion, ("step", "rms"))
        check_choice("predictor", self.predictor, ("velocity", "copy"))
        if not (_is_number(self.ridge) and 0 <= self.ridge < math.inf):
            raise expected("ridge", "a finite number >= 0", repr(self.ridge))
        check_choice("ridge_mode", self.ridge_mode, ("relative", "absolute"))
        if self.max_iterations is not None:
            check_int("max_iterations", self.max_iterations, low=1)
        _backend(self.backend)
