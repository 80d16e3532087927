"""The two floors of each GPU kernel at its target shape, and the time predicted before anything was timed.

    python bench/floors.py            # prints the table
    python bench/floors.py --write    # renders it into docs/gpu.md, between its marks

Ceilings are those measured on one H100: 3.0 TB/s copied (read and write together), 798 TFLOP/s in a bfloat16 product of
8192³ on random data; int8 is taken as twice that, float64 as published (67 TFLOP/s). A floor counts each array once a
launch that has to touch it, and the operations that the algorithm needs. A prediction is a guess with a reason, to be
compared with the first record.
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
OPERATIONS = {"bf16": 798e12, "int8": 2 * 798e12, "fp64": 67e12}


@dataclass(frozen=True)
class Row:
    """One kernel at one shape.

    bytes       of global memory, each array once
    operations  unit -> multiplications and additions
    predicted   milliseconds, and why; None where nobody has a reason yet
    launches    the Triton kernels of the row; none where it is in CUDA C++
    """

    kernel: str
    shape: str
    bytes: float
    operations: dict[str, float] = field(default_factory=dict)
    predicted: float | None = None
    why: str = ""
    launches: tuple[str, ...] = ()

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


LINEAR = ((4608, 3072, 12288, 0.074, 0.009, 0.248), (4608, 12288, 3072, 0.020, 0.009, 0.244),
          (4096, 3072, 3072, 0.017, 0.004, 0.054))
"""M, N, K; predicted milliseconds of quantization, of the scales as integers, and of the product."""
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


def linear(tokens: int, outputs: int, inputs: int, quantize: float, integers: float, product: float,
           rank: int = 32) -> list[Row]:
    """Predictions: docs/cuda_linear.md."""
    shape = f"M{tokens} N{outputs} K{inputs} r{rank}"
    activations, low, operations = tokens * inputs, 2 * tokens * rank, 2 * tokens * inputs * outputs
    return [
        Row("W4A8: quantize x, x L_down", shape, 3 * activations + 2 * rank * inputs + 4 * tokens * (rank + 1),
            {"bf16": low * inputs}, quantize, "bytes, and those of L_down from L2 once a block of 16 tokens"),
        Row("W4A8: scales as integers", shape, outputs * inputs * (1 / 2 + 4 / 64), {}, integers,
            "integer scales: the weights are read once, in search of a code of -8; a launch"),
        Row("W4A8: product, low rank, bias", shape, activations + outputs * inputs / 2 + 2 * tokens * outputs,
            {"int8": operations, "bf16": low * outputs}, product,
            "integer scales in the operand, tokens shared by pairs: 96 % of the tensor cores in the loop; a tile's end "
            "that nothing overlaps; whole rounds of tiles; "
            f"cuBLAS in bf16 has a floor of {operations / OPERATIONS['bf16'] * 1e3:.3f} ms"),
    ]


def wide_linear() -> list[Row]:
    """The int8 product behind a widening. Predictions: docs/cuda_linear.md."""
    m, n, k, rank = 4096, 3072, 3072, 32
    operations, low = {"int8": 2 * m * n * k, "bf16": 2 * m * rank * n}, m * k + 2 * m * n
    return [
        Row("W8A8: widen the weights", f"M{m} N{n} K{k} r{rank}", n * k * (1 / 2 + 2 / 64 + 1), {}, 0.009,
            "bytes, and a launch"),
        Row("W8A8: product, low rank, bias", f"M{m} N{n} K{k} r{rank}", low + n * k, operations, 0.083,
            "40.8 KB a stage of 128 columns from L2 at 32 bytes a cycle: 1300 cycles, where tensor cores take 768"),
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


# ------------------------------------------------------------------------------------------------ Triton

def triton_sla() -> list[Row]:
    w = WAN
    q_blocks, k_blocks = ceil(w.length / 128), ceil(w.length / 64)
    keys, cells = int(0.05 * k_blocks) * 64, w.heads * q_blocks * k_blocks
    state = w.heads * w.dim * (w.dim + 1)
    linear = 2 * w.heads * w.length * w.dim**2
    of_rows = 4 * state * k_blocks + 2 * state * q_blocks
    return [
        Row("SLA route", WAN_SHAPE, 2 * w.array + cells, {}, 0.140,
            "one read of Q and K (85 us); scores in float32; bars by counting, 32 bits over a row in cache",
            ("means_kernel", "scores_kernel", "select_kernel")),
        Row("SLA row lists", WAN_SHAPE, cells + 4 * cells * keys / w.length, {}, 0.005, "one launch", ("rows_kernel",)),
        Row("SLA key states, scope all", WAN_SHAPE, 2 * w.array + 4 * state, {"bf16": linear}, 0.130,
            "phi between the load and the product, two stages: 55 % of the copy rate; then the sum over the runs",
            ("key_states_kernel", "sum_all_kernel")),
        Row("SLA key states, complement and marginal", WAN_SHAPE, 2 * w.array + of_rows,
            {"bf16": linear + 2 * state * q_blocks * k_blocks}, 0.850,
            "states of every block written in float32 (0.20 ms), read once for each 64 rows of the map, four times in "
            "all, from L2 at best (0.5 ms)", ("key_states_kernel", "sum_scope_kernel")),
        Row("SLA forward", WAN_SHAPE, 4 * w.array, {"bf16": w.products(keys) + 2 * linear}, 1.000,
            "no warp specialisation, keys gathered by cp.async: 380 TFLOP/s; epilogue 0.1 ms", ("forward_kernel",)),
        Row("SLA backward: row sums, copies", WAN_SHAPE, 8 * w.array, {}, 0.310,
            "two launches; the gradients come in float32 and are written as bfloat16", ("dots_kernel",)),
        Row("SLA backward: dQ by rows", WAN_SHAPE, 6 * w.array, {"bf16": w.products(keys, 3) + linear}, 1.300,
            "three products at 400 TFLOP/s; the linear branch first, 0.1 ms", ("queries_kernel",)),
        Row("SLA backward: query states, scope all", WAN_SHAPE, 2 * w.array + 4 * state, {"bf16": linear}, 0.150,
            "as the key states, with phi / n to make", ("query_states_kernel", "sum_all_kernel")),
        Row("SLA column lists", WAN_SHAPE, cells + 4 * cells * keys / w.length, {}, 0.008,
            "one launch, 192 programs", ("columns_kernel",)),
        Row("SLA backward: dK and dV by columns", WAN_SHAPE, 6 * w.array, {"bf16": w.products(keys, 4) + 2 * linear},
            1.850, "four products at 370 TFLOP/s, tiles of 64 x 64: 64 keys read every query tile of their list; the "
            "linear branch first, 0.1 ms", ("keys_kernel",)),
    ]


def triton_vmoba() -> list[Row]:
    """Published settings at 81 x 480 x 832: chunks of 3 frames, 5 x 13, 7 x 5 x 13 on a grid of 21 x 30 x 52. A floor
    counts the chunks that a query selects."""
    w, found = WAN, []
    shape, gates, mask = "B1 H12 L32760 D128", 4 * 72 * WAN.heads * WAN.length, 72 * WAN.heads * WAN.length
    keys = 18 * 7 * 5 * 13
    rows = (("temporal, 2 of 7", 2 * 3 * 30 * 52, 4.6,
             "tiles of gathered queries filled to 82 %, at 500 TFLOP/s in runs of 4680 keys"),
            ("spatial, 6 of 24", 6 * 21 * 5 * 13, 5.1,
             "tiles filled to 80 %, at 440 TFLOP/s (4.7 ms); sums in and out of memory, 2.4 GB (0.4 ms)"),
            ("spatio-temporal, 18 of 72", keys, 6.4,
             "tiles filled to 80 %, at 440 TFLOP/s (4.7 ms); sums in and out once a query and chunk of 455 keys, "
             "7.2 GB, the writes hidden (1.7 ms)"))
    for name, seen, predicted, why in rows:
        found.append(Row(f"VMoBA forward, {name}", shape, 4 * w.array, {"bf16": w.products(seen)}, predicted, why,
                         ("vmoba_forward_kernel",)))
    shape += ", 18 of 72"
    float64 = {"fp64": 2 * w.heads * w.length * 72 * w.dim}
    return [
        *found,
        Row("VMoBA select, pools of a query", shape, 2 * w.array + 2 * gates + mask, float64, 0.700,
            "float64 gates 0.2 ms; each of 32 bits of a bar compares all 72 gates again, from L1 (0.4 ms)",
            ("chunk_means_kernel", "gates_kernel", "chunk_of_kernel", "choose_kernel")),
        Row("VMoBA select, pools of a head, threshold", shape, 2 * w.array + 12 * gates + mask, float64, 1.700,
            "eight passes, each compares every gate with 16 digits and adds in float64 (1.0 ms); 21 launches",
            ("chunk_means_kernel", "gates_kernel", "chunk_of_kernel", "extent_kernel", "totals_kernel", "digits_kernel",
             "cut_kernel", "apply_kernel")),
        Row("VMoBA lists of queries", shape, mask + 4 * mask / 4, {}, 0.070,
            "864 programs at once; each 32 dependent steps of 1024 tokens, about 2 us a step",
            ("chunk_queries_kernel",)),
        Row("VMoBA backward: row sums", shape, 2 * w.array, {}, 0.080, "one read of O and dO", ("vmoba_dots_kernel",)),
        Row("VMoBA backward: dQ by ranges", shape, 5 * w.array, {"bf16": w.products(keys, 3)}, 8.000,
            "tiles of 64 filled to 89 %, at 440 TFLOP/s (6.3 ms); sums as in the forward (1.7 ms)",
            ("vmoba_queries_kernel",)),
        Row("VMoBA backward: dK and dV by tiles", shape, 6 * w.array, {"bf16": w.products(keys, 4)}, 9.500,
            "455 keys in 8 tiles of 64, filled to 89 %, at 390 TFLOP/s: two accumulators, rows gathered by index",
            ("key_tiles_kernel", "vmoba_keys_kernel")),
    ]


def triton_linear(m: int = 4608, few: int = 3, n: int = 3072, k: int = 3072, rank: int = 32) -> list[Row]:
    shape, weights, low = f"N{n} K{k} r{rank}", n * k / 2 + 2 * n * k / 64, 2 * rank * (n + k)
    return [
        Row("Linear: quantize x, x L_down", f"M{m} {shape}", 3 * m * k + 2 * rank * k + 4 * m * (rank + 1),
            {"bf16": 2 * m * rank * k}, 0.030, "288 programs of 4 warps, two and a bit rounds; x a second time from L2",
            ("quantize_kernel",)),
        Row("Linear: W4A8 product, low rank, bias", f"M{m} {shape}", m * k + weights + 2 * m * n,
            {"int8": 2 * m * n * k, "bf16": 2 * m * n * rank}, 0.140,
            "the warps that multiply also unpack, and bring int32 sums to float32 every 64 columns: two fifths of the "
            "int8 rate", ("w4a8_kernel",)),
        Row("Linear: smooth x, x L_down", f"M{few} {shape}", 2 * few * 2 * k + low / 2, {"bf16": 2 * few * rank * k},
            0.004, "three programs: a launch and eight dependent loads", ("smooth_kernel",)),
        Row("Linear: W4A16 product, low rank, bias", f"M{few} {shape}", weights + 2 * few * (n + k) + low / 2,
            {"bf16": 2 * few * n * k}, 0.006, "48 programs, a third of the multiprocessors, eight stages deep: a third "
            "of the memory's rate", ("w4a16_kernel",)),
    ]


def triton_sampling() -> list[Row]:
    window, size = 100, 4 * 64 * 64
    elements, shape = window * size, "SD v1.5, w 100, memory 2"
    return [
        Row("TAA residuals and products", shape, 14 * elements, {}, 0.026,
            "256 programs of one warp: 13 dependent steps of 8 rows, 1.7 us each; then the sum of the shares",
            ("residual_kernel", "gather_kernel")),
        Row("TAA solve for gamma", shape, 8 * window * 4, {}, 0.008, "one program: float64 divisions in a chain",
            ("gamma_kernel",)),
        Row("TAA update", shape, 20 * elements, {}, 0.016, "1600 programs at 70 % of the copy rate; the entering rows "
            "are a launch of their own", ("update_kernel", "enter_kernel")),
    ]


def triton_adaln() -> list[Row]:
    elements, shape = 4608 * 3072, "FLUX.1: L4608 C3072, bf16"
    return [
        Row("adaLN modulate", shape, 4 * elements, {}, 0.024, "four tokens a program, their rows in registers: 80 % of "
            "the copy rate", ("modulate_kernel",)),
        Row("adaLN gate", shape, 6 * elements, {}, 0.033, "two reads and one write at 85 %", ("gate_kernel",)),
    ]


# ------------------------------------------------------------------------------------------------ the tables

def cuda() -> list[Row]:
    found = sla()
    for case in LINEAR:
        found += linear(*case)
    return [*found, *wide_linear(), *sampling(), *adaln()]


def triton() -> list[Row]:
    return [*triton_sla(), *triton_vmoba(), *triton_linear(), *triton_sampling(), *triton_adaln()]


def rows() -> list[Row]:
    return [*cuda(), *triton()]


def sums() -> list[str]:
    """What the CUDA rows predict for whole calls, beside the targets."""
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
    for tokens, outputs, inputs, *parts in LINEAR:
        cublas = 2 * tokens * outputs * inputs / OPERATIONS["bf16"] * 1e3
        lines.append(f"| W4A8, M{tokens} N{outputs} K{inputs} (cuBLAS at its ceiling: {cublas:.3f}) | "
                     f"{sum(parts):.3f} | {cublas / 1.4:.3f} |")
    return [*lines, f"| TAA step | {sum(row.predicted for row in sampling()):.3f} | 0.036 |",
            f"| dense attention at its ceiling | {WAN.products(WAN.length) / OPERATIONS['bf16'] * 1e3:.2f} | |"]


def triton_sums() -> list[str]:
    """The same of the Triton rows."""
    times = {row.kernel: row.predicted for row in triton()}
    routed, states = ("SLA route", "SLA row lists"), "SLA key states, scope all"
    calls = {
        "SLA forward, routing included, scope all": ((*routed, states, "SLA forward"), "0.80"),
        "SLA forward, routing included, other scopes":
            ((*routed, "SLA key states, complement and marginal", "SLA forward"), "1.10"),
        "SLA backward, scope all": ((states, "SLA row lists", "SLA column lists",
                                     *(name for name in times if name.startswith("SLA backward"))), "2.30"),
        "VMoBA, 18 of 72, selection included": (("VMoBA select, pools of a query", "VMoBA lists of queries",
                                                 "VMoBA forward, spatio-temporal, 18 of 72"), ""),
        "VMoBA backward, 18 of 72":
            (("VMoBA lists of queries", *(name for name in times if name.startswith("VMoBA backward"))), ""),
        "W4A8, M4608 N3072 K3072":
            (("Linear: quantize x, x L_down", "Linear: W4A8 product, low rank, bias"), ""),
        "TAA step": ([name for name in times if name.startswith("TAA")], "0.036"),
    }
    lines = ["| call in Triton | predicted, ms | target, ms |", "|---|--:|--:|"]
    for name, (parts, target) in calls.items():
        total = sum(times[part] for part in parts)
        lines.append(f"| {name} | {total:.{2 if total >= 1 else 3}f} | {target} |")
    return lines


def table(found: list[Row]) -> list[str]:
    launches = any(row.launches for row in found)
    lines = [f"| kernel | shape |{' launches |' * launches} MB | bytes, ms | TFLOP | operations, ms | predicted, ms | "
             "why |",
             f"|---|---|{'---|' * launches}--:|--:|--:|--:|--:|---|"]
    for row in found:
        count = sum(row.operations.values())
        names = f" {', '.join(name.removesuffix('_kernel') for name in row.launches)} |" if launches else ""
        lines.append(f"| {row.kernel} | {row.shape} |{names} {row.bytes / 1e6:.1f} | {row.bytes_ms:.3f} | "
                     f"{f'{count / 1e12:.3f}' if count else ''} | {f'{row.operations_ms:.3f}' if count else ''} | "
                     f"{'' if row.predicted is None else f'{row.predicted:.3f}'} | {row.why} |")
    return lines


def tables() -> str:
    return "\n".join(["CUDA C++:", "", *table(cuda()), "", *sums(), "", "Triton (`launches`: the kernels of a row, "
                      "without their ending `_kernel`):", "", *table(triton()), "", *triton_sums()])


def rendered(text: str) -> str:
    """The page with its table made anew."""
    made, count = MARK.subn(lambda _: f"<!-- floors -->\n{tables()}\n<!-- end -->", text)
    if count != 1:
        raise ValueError(f"expected one <!-- floors --> … <!-- end --> in {PAGE.name}, got {count}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(rendered(PAGE.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
