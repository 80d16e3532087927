"""docs/triton_kernels.md: what the compiler made of every Triton kernel at the shape it is made for, on every chip.

`python tests/triton_offline.py --write` compiles and renders; `stale` compiles nothing: the page says which launches
and which sources it was rendered from, and both are read off the tree.
"""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

import triton
import triton_offline
from triton_offline import TARGETS, Built, families, targets_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "triton_kernels.md"
SIZES = ("BM", "BN", "BK", "BC", "BD", "ROWS", "COLS", "TOKENS", "CP", "R", "RANGE", "SPAN", "TILE")
"""Constexpr parameters of the kernels that are sizes of a tile."""

MULTIPROCESSOR = {80: (64, 32, 164), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228), 120: (48, 24, 100)}
"""Chip -> warps and blocks that a multiprocessor holds at most, KiB of its shared memory. Each has 65536 registers."""


def occupancy(chip: int, registers: int, shared: int, warps: int, tensor: int = 0) -> int:
    """Blocks that a multiprocessor holds at once. Registers go to warps in units of 256; a block takes 1 KiB of shared
    memory more than it uses."""
    most_warps, most_blocks, memory = MULTIPROCESSOR[chip]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_tensor = 512 // tensor if tensor else most_blocks
    return min(by_registers, (memory << 10) // (shared + 1024), most_warps // warps, most_blocks, by_tensor)


def tile_of(launch: tuple) -> str:
    """The sizes that its launcher gave."""
    return " ".join(f"{name} {launch[2][name]}" for name in SIZES if name in launch[2])


def recorded(family: str, chip: int) -> list[tuple[str, tuple]]:
    """(the row's beginning, launch) of each launch at the family's targets."""
    found = []
    for case in targets_of(family, chip):
        for launch in triton_offline.record(case.call, chip):
            options = launch[2]
            row = f"| {launch[0].fn.__name__} | sm_{chip} | {tile_of(launch)} | {options.get('num_warps', 4)} | " \
                  f"{options.get('num_stages', '')} |"
            found.append((row, launch))
    return found


def _code(path: Path) -> str:
    """A file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False):
            del node.body[0]
    return ast.dump(tree)


def sources() -> str:
    """A hash of the kernels' code."""
    text = "\n".join(f"{path.name} {_code(path)}" for path in sorted((ROOT / "triton_kernels").glob("*.py")))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cells(chip: int, built: list[Built]) -> str:
    registers, shared = max(b.registers for b in built), max(b.shared for b in built)
    stack, tensor = max(max(b.stack, b.local) for b in built), max(b.tensor for b in built)
    blocks = min(occupancy(chip, b.registers, b.shared, b.warps, b.tensor) for b in built)
    share = blocks * built[0].warps / MULTIPROCESSOR[chip][0]
    matrix = ", ".join(sorted({name for b in built for name in b.matrix}))
    memory = f"{shared} + {tensor} columns" if tensor else str(shared)
    return f" {len(built)} | {registers} | {stack} | {memory} | {blocks} | {share:.0%} | {matrix} |"


def page(say=lambda text: None) -> tuple[str, list[str]]:
    """(the page, the rules that kernels on it break)"""
    problems, lines = [], [
        "# The Triton kernels as compiled", "",
        "Rendered by `python tests/triton_offline.py --write` from the machine code; not written by hand, and nothing",
        "here was timed ([how](gpu.md)). A row: a kernel on a chip with a tile, at the shape that it is made for, the",
        "largest of what is compiled for it: registers a thread; bytes that spill; shared memory a block, on sm_100",
        "with the columns of tensor memory (of 512); blocks that a multiprocessor holds at once by registers, memory",
        "and warps, and the share of its warps that they are; the matrix instructions in the code. Stages: what the",
        "launcher asks for, empty where it leaves them to Triton. Floors and predicted times: [GPU](gpu.md).", "",
        f"Triton {triton.__version__}, sources {sources()}.",
    ]
    for family in families():
        shapes = [case.name for case in targets_of(family, 90)]
        doc = __import__(f"triton_launches_{family}").targets.__doc__
        lines += ["", f"## {family}", "", f"{doc} ({'; '.join(shapes)})", "",
                  "| kernel | chip | tile | warps | stages | compiled | registers | spills | shared memory | "
                  "blocks an SM | warps of an SM | matrix |", "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"]
        rows: dict[str, dict[int, Built]] = {}
        for chip in TARGETS:
            for row, launch in recorded(family, chip):
                built = triton_offline.build(launch, chip)
                rows.setdefault(row, {})[id(built)] = built
                say(f"{family} {built}")
                problems += built.problems()
        lines += [row + _cells(next(iter(built.values())).chip, list(built.values()))
                  for row, built in sorted(rows.items(), key=lambda item: _order(item[0]))]
    return "\n".join(lines) + "\n", problems


def _order(row: str) -> tuple:
    name, chip = re.match(r"\| (\w+) \| sm_(\d+) ", row).groups()
    return name, int(chip), row


def stale() -> list[str]:
    """What the page does not say of the tree as it is."""
    text = PAGE.read_text()
    found = [] if f", sources {sources()}." in text else ["the kernels' sources have changed since"]
    said = {" ".join(re.match(r"(\| [^|]+\| sm_[^|]+\|[^|]*\|[^|]*\|[^|]*\|)", line)[1].split())
            for line in text.splitlines() if "| sm_" in line}
    now = {" ".join(row.split()) for family in families() for chip in TARGETS for row, _ in recorded(family, chip)}
    return found + [f"is not launched: {row}" for row in sorted(said - now)] + \
        [f"is not on the page: {row}" for row in sorted(now - said)]


def write() -> int:
    text, problems = page(lambda line: print(line, flush=True))
    print(*problems, sep="\n")
    if not problems:
        PAGE.write_text(text)
    return bool(problems)
