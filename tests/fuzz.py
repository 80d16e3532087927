"""Random calls of every CPU kernel against its float64 reference, within an error budget.

    python tests/fuzz.py --cases 10000 --seed 0 --minutes 8          all ops, in turn
    python tests/fuzz.py --op sla.forward --seed 0 --case 123        one case again, as a failure prints it

A case is given by its op, seed and number alone. In every second one the kernels' arguments lie against an inaccessible
page (tests/guard.py): a read or write past them ends the worker, which counts as a failure of that case.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from unittest import mock

import fuzz_adaln
import fuzz_sla
import fuzz_svdq
import fuzz_taa
import fuzz_vmoba
import torch
from fuzz_draw import Draw
from guard import guarded_arguments

import triskele

CASES = {**fuzz_sla.CASES, **fuzz_vmoba.CASES, **fuzz_svdq.CASES, **fuzz_taa.CASES,
         **fuzz_adaln.CASES}
GUARDS = ("none", "end", "none", "start")
THREADS = (1, 1, 1, 1, 1, 1, 1, 2, 3)
SHOWN = 8
"""Failures whose text is printed; the rest are counted."""


def _draw(op: str, seed: int, case: int) -> Draw:
    draw = Draw(f"{seed} {op} {case}")
    draw.choice("guard", GUARDS)
    draw.choice("threads", THREADS)
    return draw


def run_case(op: str, seed: int, case: int, guard: str | None = None) -> Draw:
    """Raises what the case raises, with what was drawn in the message."""
    draw = _draw(op, seed, case)
    before = torch.get_num_threads()
    torch.set_num_threads(draw.facts["threads"])
    try:
        with guarded_arguments(guard or draw.facts["guard"]):
            CASES[op](draw)
    except Exception as error:
        error.drawn = str(draw)
        raise
    finally:
        torch.set_num_threads(before)
    return draw


def facts(op: str, seed: int, case: int) -> str:
    """What a case draws, where the process that ran it is gone: no kernel is called."""
    draw = _draw(op, seed, case)

    def stop(*_args, **_kwargs):
        raise InterruptedError

    module = sys.modules[CASES[op].__module__]
    with contextlib.ExitStack() as stack:
        for name in set(triskele.ops.__all__) & set(vars(module)) - {"vmoba_partition"}:
            stack.enter_context(mock.patch.object(module, name, stop))
        stack.enter_context(contextlib.suppress(InterruptedError))
        CASES[op](draw)
    return str(draw)


def command(op: str, seed: int, case: int, guard: str | None) -> str:
    return f"python tests/fuzz.py --op {op} --seed {seed} --case {case}" + (f" --guard {guard}" if guard else "")


def _work(ops, options, first, stride, at, done, failures, deadline):
    """One worker: the cases first, first + stride, …; `at` is the one under way."""
    for case in range(first, options.cases, stride):
        if time.monotonic() > deadline:
            break
        at.value = case
        op = ops[case % len(ops)]
        try:
            run_case(op, options.seed, case, options.guard)
        except Exception as error:
            failures.put((op, case, error.drawn, traceback.format_exc(limit=-3)))
        done.value += 1
    at.value = -1


class Worker:
    """A process that goes through its share of the cases; started again behind one that killed it."""

    def __init__(self, ops, options, first, stride, failures, deadline):
        self.context, self.given = multiprocessing.get_context("fork"), (ops, options, first, stride)
        self.at, self.done = self.context.RawValue("q", -1), self.context.RawValue("q", 0)
        self.failures, self.deadline, self.process = failures, deadline, None
        self.start(first)

    def start(self, first):
        ops, options, _, stride = self.given
        self.process = self.context.Process(
            target=_work, args=(ops, options, first, stride, self.at, self.done, self.failures, self.deadline))
        self.process.start()

    def look(self) -> tuple[str, int, int] | None:
        """The case that killed the process and the exit code, where one did; then goes on behind it."""
        if self.process.is_alive() or self.process.exitcode == 0:
            return None
        case, code = self.at.value, self.process.exitcode
        ops, _, _, stride = self.given
        if case < 0:
            raise RuntimeError(f"a worker ended with {code} outside any case")
        self.done.value += 1
        self.start(case + stride)
        return ops[case % len(ops)], case, code


def fuzz(options) -> int:
    """The number of cases that failed. Forks: for a process in which nothing has run on several threads yet."""
    ops = options.op or sorted(CASES)
    start, found = time.monotonic(), []
    torch.set_num_threads(1)  # no thread is there when the workers are forked
    queue = multiprocessing.get_context("fork").SimpleQueue()
    deadline = start + 60 * options.minutes
    workers = [Worker(ops, options, i, options.jobs, queue, deadline) for i in range(options.jobs)]

    def report(op, case, drawn, text):
        found.append((op, case))
        if len(found) <= SHOWN:
            print(f"FAILED {op}: {command(op, options.seed, case, options.guard)}\n  {drawn}\n{text}", flush=True)

    while True:
        alive = any(worker.process.is_alive() for worker in workers)
        while not queue.empty():
            report(*queue.get())
        for worker in workers:
            if dead := worker.look():
                op, case, code = dead
                report(op, case, facts(op, options.seed, case), f"  the process was ended by signal {-code}")
                alive = True
        if not alive:
            break
        time.sleep(0.05)
    total = sum(worker.done.value for worker in workers)
    seconds = time.monotonic() - start
    print(f"{total} of {options.cases} cases of {len(ops)} ops, seed {options.seed}, {seconds:.0f} s: "
          f"{len(found)} failed", flush=True)
    return len(found)


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--op", action="append", choices=sorted(CASES))
    parser.add_argument("--case", type=int, help="this case alone, in this process (one --op)")
    parser.add_argument("--guard", choices=("none", "start", "end"), help="for every case, in place of the drawn one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.case is not None and len(options.op or ()) != 1:
        parser.error("--case needs one --op")
    return options


def main(arguments) -> int:
    options = parse(arguments)
    if options.case is not None:
        print(run_case(options.op[0], options.seed, options.case, options.guard))
        return 0
    return min(fuzz(options), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
