"""What changed between two records, or between two commits.

    python bench/compare.py before.json after.json             # records of bench/run.py
    python bench/compare.py COMMIT_A COMMIT_B --only sla       # built in temporary worktrees and run in turns
    python bench/compare.py HEAD . --only svdq_linear          # a commit against this tree, as it is built now

Records: the ratios to a peer of the same run are compared, not milliseconds, so the machine's mood cancels. Commits:
this bench/run.py measures both, each in processes of its own that take turns, and our milliseconds are compared; a side
may also be a folder that is built already. Exit 1 where something is slower by more than --tolerance (default 0.1).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from gpu_environment import overlay

ROOT = Path(__file__).parent.parent


def moved(before: dict, after: dict) -> list[tuple[str, str, float, float]]:
    """(case, peer, ratio before, ratio after) for what both records hold."""
    old = {case["name"]: case["ratios"] for case in before["cases"] if "error" not in case}
    return [(case["name"], peer, old[case["name"]][peer], ratio)
            for case in after["cases"] if case["name"] in old and "error" not in case
            for peer, ratio in case["ratios"].items() if peer in old[case["name"]]]


def compare_records(before: dict, after: dict, tolerance: float) -> int:
    places = [f"{r['machine'].get('gpu', r['machine']['cpu'])} at {r['machine']['commit']}" for r in (before, after)]
    print(f"{places[0]}  ->  {places[1]}")
    rows = moved(before, after)
    if not rows:
        raise SystemExit("the two records have no case in common")
    slower = 0
    for case, peer, old, new in rows:
        fell = new < old * (1 - tolerance)
        slower += fell
        print(f"{'SLOWER ' if fell else '       '}{case:<64} {peer:<30} {old:6.2f}x -> {new:6.2f}x")
    return 1 if slower else 0


@contextmanager
def built_tree(side: str):
    """The folder of `side`: the folder itself, or a temporary worktree of that commit, built."""
    if (Path(side) / "python" / "triskele").is_dir():
        yield Path(side).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), side], cwd=ROOT, check=True,
                       capture_output=True)
        try:
            print(f"building {side} (minutes)", file=sys.stderr)
            # Without a GPU its kernels are not measured: no nvcc is found in an empty folder.
            environment = os.environ | ({} if torch.cuda.is_available() else {"CUDA_HOME": folder})
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True,
                           env=environment)
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def side_environment(tree: Path) -> dict[str, str]:
    """For a process that imports all of triskele from `tree`: where a tree is installed, its own Triton kernels and
    assets would be found otherwise, since they lie outside python/. The links lie in the tree, for its commit."""
    site = overlay(tree / "build" / "compare" / "site", tree)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_side(tree: Path, out: Path, options: list[str]) -> dict:
    """One record of our calls alone."""
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--no-peers", "--out", str(out), *options]
    # The exit status is 1 where a case failed: the record says so.
    subprocess.run(command, env=side_environment(tree), check=False, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def best_medians(records: list[dict]) -> dict[str, float]:
    """Case -> our milliseconds: the median of the quietest run."""
    found: dict[str, list[float]] = {}
    for record in records:
        for case in record["cases"]:
            if "error" not in case:
                found.setdefault(case["name"], []).append(case["timings"]["triskele"]["median_ms"])
    return {name: min(values) for name, values in found.items()}


def compare_commits(sides: list[str], turns: int, options: list[str], tolerance: float) -> int:
    with ExitStack() as stack:
        trees = [stack.enter_context(built_tree(side)) for side in sides]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        records: list[list[dict]] = [[], []]
        for turn in range(turns):
            for i in (0, 1) if turn % 2 == 0 else (1, 0):  # neither side always comes first
                records[i].append(run_side(trees[i], folder / f"{i}-{turn}.json", options))
    before, after = map(best_medians, records)
    print(f"{records[0][0]['machine']['commit']}  ->  {records[1][0]['machine']['commit']}, {turns} turns each")
    slower = 0
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            print(f"        {name:<72} only {'after' if name in after else 'before'}")
            continue
        speedup = before[name] / after[name]
        fell = speedup < 1 - tolerance
        slower += fell
        print(f"{'SLOWER  ' if fell else '        '}{name:<72} {before[name]:9.2f} ms -> {after[name]:9.2f} ms  "
              f"{speedup:5.2f}x")
    return 1 if slower else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a record, a commit or a built tree")
    parser.add_argument("after")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--turns", type=int, default=3, help="of commits: runs a side")
    parser.add_argument("--only", help="of commits: as bench/run.py takes it")
    parser.add_argument("--cases", choices=("short", "curves"), default="short")
    parser.add_argument("--seconds", type=float, default=1.0, help="of commits: a case and turn")
    args = parser.parse_args(arguments)
    sides = [args.before, args.after]
    files = [Path(side) for side in sides if Path(side).is_file()]
    if len(files) == 2:
        return compare_records(*(json.loads(path.read_text()) for path in files), args.tolerance)
    if files:
        parser.error("expected two records, or two commits or trees; got one of each")
    options = ["--cases", args.cases, "--seconds", str(args.seconds), *(["--only", args.only] if args.only else [])]
    return compare_commits(sides, args.turns, options, args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
