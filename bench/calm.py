"""Whether a measurement is quiet enough to be a record: what is measured again, and what the tables flag."""

from __future__ import annotations

CALM = 0.2
"""Spread (of the middle half, over the median) above which a row is noisy."""
REPEATS = 3
"""How often a case with a target is measured at most while it is noisy."""
BEST_DENSE = "the best sdpa"
"""Name of the ratio to the fastest of several dense attentions."""


def spreads_of(timings: dict[str, dict], targets: dict[str, float]) -> dict[str, float]:
    """Name -> spread, of those that decide: ours and the peers of the targets."""
    dense = [name for name in timings if name.startswith("sdpa")]
    names = {"triskele", *targets}
    if BEST_DENSE in targets and dense:
        names.add(min(dense, key=lambda name: timings[name]["median_ms"]))
    return {name: timing["spread"] for name, timing in timings.items() if name in names and "spread" in timing}


def unrest(timings: dict[str, dict], targets: dict[str, float]) -> float:
    """The largest spread among those that decide."""
    return max(spreads_of(timings, targets).values(), default=0.0)


def noisy(case: dict) -> str:
    """What a table says of a row of a record whose spread stayed above `CALM`: "", or whose."""
    found = {name: spread for name, spread in spreads_of(case["timings"], case["targets"]).items() if spread > CALM}
    return ", ".join(f"{'ours' if name == 'triskele' else name} {spread:.0%}" for name, spread in found.items())
