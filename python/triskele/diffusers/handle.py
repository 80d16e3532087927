"""What `patch` returns: says what was replaced, and puts everything back."""

from __future__ import annotations

from itertools import groupby

from triskele.diffusers.interface import SAMPLER, Replaced
from triskele.diffusers.undo import UndoLog


class Summary(str):
    """Text that prints as it reads, in an interactive session too."""

    def __repr__(self) -> str:
        return str(self)


class Handle:
    """A live patch. `restore()` leaves the pipeline as it was, bit for bit; leaving a `with` block does the same.

    target    the pipeline or model that was patched
    configs   arm -> its config, for the arms in use
    replaced  tuple of `Replaced`, one a site, with the backends of the moment at which it is read
    sampler   the sampler arm's own object (what its last runs took), None without that arm
    """

    def __init__(self, target, configs: dict, replaced: list[Replaced], undo: UndoLog):
        self.target = target
        self.configs = dict(configs)
        self._replaced = tuple(replaced)
        self.sampler = getattr(target, SAMPLER, None) if "sampler" in configs else None
        self._undo = undo
        self._live = True

    @property
    def live(self) -> bool:
        """False once restored."""
        return self._live

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        return tuple(row.answered() for row in self._replaced)

    def summary(self) -> Summary:
        """What was replaced, by which backend now, and why the better ones refuse."""
        lines = [f"triskele patch on {type(self.target).__name__}, {self._state}"]
        replaced = self.replaced
        for arm in ("attention", "linear", "sampler"):
            rows = [r for r in replaced if r.arm == arm]
            if not rows:
                continue
            lines.append(f"{arm}: {self.configs[arm]}")

            def key(row):
                return row.was, row.now, row.backend, row.reasons

            for (was, now, backend, reasons), group in groupby(sorted(rows, key=key), key):
                names = [row.name for row in group]
                where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
                on = {"": "", "none": ": no backend takes it yet"}.get(backend, f" on {backend}")
                lines.append(f"  {len(names)} x {was} -> {now}{on}   ({where})")
                lines += [f"      not {reason}" for reason in reasons]
        return Summary("\n".join(lines))

    def restore(self) -> None:
        """Take the patch off. A second call does nothing."""
        if self._live:
            self._replaced = self.replaced  # what it was; and holds no longer on to what was put in
        self._live = False
        self._undo.rollback()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_exc) -> None:
        self.restore()

    def __repr__(self) -> str:
        arms = ", ".join(f"{arm}={config}" for arm, config in self.configs.items())
        return f"<triskele patch on {type(self.target).__name__}, {self._state}: {arms}>"

    @property
    def _state(self) -> str:
        return "live" if self._live else "restored"
