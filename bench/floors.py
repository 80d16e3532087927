"""The two floors of each GPU kernel at its target shape, and the time predicted before anything was timed.

    python bench/floors.py            # prints the table
    python bench/floors.py --write    # renders it into docs/gpu.md, between its marks

Ceilings are those measured on one H100: 3.0 TB/s copied (read and write together), 798 TFLOP/s in a bfloat16 product of
8192³ on random data; int8 is taken as twice that. A floor counts each array once a launch that has to touch it, and the
operations that the algorithm needs. A prediction is a guess with a reason, to be compared with the first record.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
MARK = re.compile(r"<!-- floors -->\n.*?<!-- end -->", re.DOTALL)
BYTES = 3.0e12
OPERATIONS = {"bf16": 798e12, "int8": 2 * 798e12}


@dataclass(frozen=True)
class Row:
    """One kernel at one shape.

    bytes       of global memory, each array once
    operations  unit -> multiplications and additions
    predicted   milliseconds, and why; None where nobody has a reason yet
    """

    kernel: str
    shape: str
    bytes: float
    operations: dict[str, float] = field(default_factory=dict)
    predicted: float | None = None
    why: str = ""

    @property
    def bytes_ms(self) -> float:
        return self.bytes / BYTES * 1e3

    @property
    def operations_ms(self) -> float:
        return sum(count / OPERATIONS[unit] for unit, count in self.operations.items()) * 1e3


@dataclass(frozen=True)
class Attention:
    """Self-attention of a video model, 16-bit elements."""

    heads: int
    length: int
    dim: int

    @property
    def array(self) -> int:
        """Bytes of Q, K, V or O."""
        return 2 * self.heads * self.length * self.dim

    def products(self, keys: float, count: int = 2) -> float:
        """Operations of `count` products [L, keys, D]."""
        return 2 * count * self.heads * self.length * keys * self.dim


LINEAR = ((4608, 3072, 12288, 0.074, 0.322), (4608, 12288, 3072, 0.020, 0.310), (4096, 3072, 3072, 0.017, 0.069))
"""M, N, K; predicted milliseconds of quantization and product."""
WAN = Attention(12, 32760, 128)
WAN_SHAPE = "B1 H12 L32760 D128, keep 5 %, 128 x 64"


def sla() -> list[Row]:
    """Predictions: docs/cuda_sla.md, docs/cuda_sla_backward.md."""
    w = WAN
    q_blocks, k_blocks = ceil(w.length / 128), ceil(w.length / 64)
    keys = int(0.05 * k_blocks) * 64
    state = w.heads * w.dim * (w.dim + 1)
    linear = 2 * w.heads * w.length * w.dim**2  # one product with a D x D state
    cover = 2 * state * q_blocks * k_blocks
    return [
        Row("route: pool, score, select", WAN_SHAPE, 2 * w.array + w.heads * q_blocks * k_blocks, {}, 0.103,
            "one read of Q and K with all loads in flight (80 us), then two short launches"),
        Row("lists of critical blocks", WAN_SHAPE, w.heads * q_blocks * (k_blocks + 4 * keys / 64), {}, 0.004,
            "one launch"),
        Row("linear state, scope all", WAN_SHAPE, 2 * w.array + 4 * state, {"bf16": linear}, 0.101,
            "132 blocks; phi takes as long as the loads; then the sum over them"),
        Row("linear states, complement and marginal", WAN_SHAPE,
            2 * w.array + 4 * state * k_blocks + 2 * state * q_blocks, {"bf16": linear + cover}, 0.330,
            "states of every block written (160 us) and read; a mask product at 300 TFLOP/s by mma.sync (170 us)"),
        Row("forward: sparse core, linear branch, projection", WAN_SHAPE, 4 * w.array,
            {"bf16": w.products(keys) + 2 * linear}, 0.570,
            "3072 tiles in 24 rounds of 132; 620 TFLOP/s as dense kernels of this shape reach; L2's floor is 0.51 ms"),
        Row("backward: lists, prepare", WAN_SHAPE, 4 * w.array, {}, 0.165, "the gradient comes in float32"),
        Row("backward: linear branch", WAN_SHAPE, 10 * w.array, {"bf16": 5 * linear}, 0.800,
            "one block of 8 warps a multiprocessor, loads not overlapped"),
        Row("backward: dQ by rows", WAN_SHAPE, 5 * w.array, {"bf16": w.products(keys, 3)}, 1.0,
            "S, dP, dQ; one warpgroup's exponentials under the other's products"),
        Row("backward: dK and dV by columns", WAN_SHAPE, 5 * w.array, {"bf16": w.products(keys, 4)}, 1.6,
            "S, dP, dV, dK; 64 keys a block read every query tile of their list: L2's floor is 0.93 ms"),
    ]


def vmoba() -> list[Row]:
    """Published settings at 81 x 480 x 832: chunks of 3 frames, 5 x 13, 7 x 5 x 13 on a grid of 21 x 30 x 52."""
    w, rows = WAN, []
    for name, keys in (("temporal, 2 of 7", 2 * 3 * 30 * 52), ("spatial, 6 of 24", 6 * 21 * 5 * 13),
                       ("spatio-temporal, 18 of 72", 18 * 7 * 5 * 13)):
        rows.append(Row(f"VMoBA forward, {name}", "B1 H12 L32760 D128", 4 * w.array, {"bf16": w.products(keys)}))
    return rows


def linear(tokens: int, outputs: int, inputs: int, quantize: float, product: float, rank: int = 32) -> list[Row]:
    """Predictions: docs/cuda_linear.md."""
    shape = f"M{tokens} N{outputs} K{inputs} r{rank}"
    activations, low, operations = tokens * inputs, 2 * tokens * rank, 2 * tokens * inputs * outputs
    return [
        Row("W4A8: quantize x, x L_down", shape, 3 * activations + 2 * rank * inputs + 4 * tokens * (rank + 1),
            {"bf16": low * inputs}, quantize, "bytes, and those of L_down from L2 once a block of 16 tokens"),
        Row("W4A8: product, low rank, bias", shape, activations + outputs * inputs / 2 + 2 * tokens * outputs,
            {"int8": operations, "bf16": low * outputs}, product,
            "issue slots: the float32 scale of every 64 columns leaves 73 % of the int8 rate; whole rounds of tiles; "
            f"cuBLAS in bf16 has a floor of {operations / OPERATIONS['bf16'] * 1e3:.3f} ms"),
    ]


def sampling() -> list[Row]:
    """Predictions: docs/sampling.md."""
    window, size = 100, 4 * 64 * 64
    elements, shape = window * size, "SD v1.5, w 100, memory 2"
    return [
        Row("TAA pass one", shape, 14 * elements, {}, 0.018,
            "32 blocks: the chip's latency 13 times, eight rows asked for at a time; then the sum of the shares"),
        Row("TAA small solve", shape, 8 * window * 4, {}, 0.006, "one block, four trips to memory"),
        Row("TAA pass two", shape, 20 * elements, {}, 0.015, "as pass one"),
    ]


def adaln() -> list[Row]:
    elements = 32760 * 1536
    return [
        Row("adaLN modulate", "Wan2.1-1.3B: L32760 C1536, bf16", 4 * elements, {}, 4 * elements / BYTES * 1e3 / 0.85,
            "one read and one write at 85 % of the copy rate; a row stays in registers from its mean to its output"),
        Row("adaLN gate", "Wan2.1-1.3B: L32760 C1536, bf16", 6 * elements, {}, 6 * elements / BYTES * 1e3 / 0.85,
            "two reads and one write at 85 %"),
    ]


def rows() -> list[Row]:
    found = [*sla(), *vmoba()]
    for case in LINEAR:
        found += linear(*case)
    return [*found, *sampling(), *adaln()]


def sums() -> list[str]:
    """What the rows predict for whole calls, beside the targets."""
    predicted = {row.kernel: row.predicted for row in sla()}
    routed = ("route: pool, score, select", "lists of critical blocks")
    core = "forward: sparse core, linear branch, projection"
    calls = {
        "SLA forward, routing included, scope all": ((*routed, "linear state, scope all", core), 0.80),
        "SLA forward, routing included, other scopes": ((*routed, "linear states, complement and marginal", core), 1.1),
        "SLA backward": ([name for name in predicted if name.startswith("backward")], 2.30),
    }
    lines = ["| call | predicted, ms | target, ms |", "|---|--:|--:|"]
    for name, (parts, target) in calls.items():
        lines.append(f"| {name} | {sum(predicted[part] for part in parts):.2f} | {target:.2f} |")
    for tokens, outputs, inputs, quantize, product in LINEAR:
        cublas = 2 * tokens * outputs * inputs / OPERATIONS["bf16"] * 1e3
        lines.append(f"| W4A8, M{tokens} N{outputs} K{inputs} (cuBLAS at its ceiling: {cublas:.3f}) | "
                     f"{quantize + product:.3f} | {cublas / 1.4:.3f} |")
    return [*lines, f"| TAA step | {sum(row.predicted for row in sampling()):.3f} | 0.036 |",
            f"| dense attention at its ceiling | {WAN.products(WAN.length) / OPERATIONS['bf16'] * 1e3:.2f} | |"]


def table() -> str:
    lines = ["| kernel | shape | MB | bytes, ms | TFLOP | operations, ms | predicted, ms | why |",
             "|---|---|--:|--:|--:|--:|--:|---|"]
    for row in rows():
        count = sum(row.operations.values())
        lines.append(f"| {row.kernel} | {row.shape} | {row.bytes / 1e6:.1f} | {row.bytes_ms:.3f} | "
                     f"{f'{count / 1e12:.3f}' if count else ''} | {f'{row.operations_ms:.3f}' if count else ''} | "
                     f"{'' if row.predicted is None else f'{row.predicted:.3f}'} | {row.why} |")
    return "\n".join([*lines, "", *sums()])


def rendered(text: str) -> str:
    """The page with its table made anew."""
    made, count = MARK.subn(lambda _: f"<!-- floors -->\n{table()}\n<!-- end -->", text)
    if count != 1:
        raise ValueError(f"expected one <!-- floors --> … <!-- end --> in {PAGE.name}, got {count}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(rendered(PAGE.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
