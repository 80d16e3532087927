"""Loops in machine code, as `cuobjdump -sass` and `nvdisasm -c` print it."""

from __future__ import annotations

import re
from collections.abc import Iterable

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*?(?:0x([0-9a-f]+)|`\((\.L_x_\d+)\))\s*$")


class Function:
    """The lines of one function, fed one by one."""

    def __init__(self):
        self.code: list[tuple[int, str]] = []  # (address, instruction)
        self._labels: dict[str, int] = {}
        self._waiting: list[str] = []  # labels whose instruction has not come yet

    def feed(self, line: str) -> None:
        if match := _LABEL.match(line):
            self._waiting.append(match[1])
        elif match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            self._labels.update(dict.fromkeys(self._waiting, address))
            self._waiting.clear()
            self.code.append((address, match[2].strip()))

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) address of each loop: a branch back and where it leads. One that leads to itself is the trap
        after a kernel's end."""
        found = []
        for address, text in self.code:
            if match := _BRANCH.search(text):
                to = int(match[1], 16) if match[1] else self._labels.get(match[2], address)
                if to < address:
                    found.append((to, address))
        return found

    def in_loops(self, instruction: re.Pattern) -> int:
        """How many instructions that match lie in a loop."""
        loops = self.loops()
        return sum(any(first <= address <= last for first, last in loops)
                   for address, text in self.code if instruction.search(text))


def function(lines: Iterable[str]) -> Function:
    found = Function()
    for line in lines:
        found.feed(line)
    return found
