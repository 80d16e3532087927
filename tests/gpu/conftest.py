"""Keeps the results by op and backend, and leaves them as a record where TRISKELE_GPU_RECORD names a file.

The record is rewritten while the tests run: what a time limit cuts off is there as far as it came, and counts as
incomplete.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from gpu.family import DEVICE, by_entry

BENCH = Path(__file__).parent.parent.parent / "bench"
NAMES = re.compile(r"::test_(?P<check>\w+)\[(?P<entry>[\w.]+/\w+):")
EVERY = 2.0  # seconds between two writes


def _of_bench(name: str):
    """A module of bench/, whose folder does not stay on the path: its names are too plain for that."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


class Record:
    """The controller's side: with xdist the tests themselves run elsewhere."""

    def __init__(self, config: pytest.Config, path: Path):
        from triskele import machine
        from triskele.backend import architecture


        self.path, self.written, self.sources = path, 0.0, _of_bench("gpu_sources")
        whole = not (config.option.keyword or config.option.markexpr or config.option.deselect
                     or any("::" in argument for argument in config.args))
        on_gpu = torch.cuda.is_available() and not os.environ.get("TRISKELE_GPU_DRY")
        described = machine.describe()
        described["commit"] = _of_bench("gpu_environment").commit_of(described)
        self.record = {
            "kind": "gpu_tests", "dry": not on_gpu, "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": described, "whole_suite": whole, "results": {},
            "architecture": architecture(torch.device("cuda")) if on_gpu else None}
        self.seen: set[str] = set()

    def entry(self, name: str) -> dict:
        op, backend = name.split("/")
        return self.record["results"].setdefault(name, {
            "collected": 0, "passed": 0, "failed": [], "refused": {}, "checks": {}, "seconds": 0.0,
            "complete": self.record["whole_suite"],
            "sources": self.sources.running(op, backend) if backend in ("cuda", "triton") else None})

    def collected(self, ids: list[str]) -> None:
        for node in ids:
            if (match := NAMES.search(node)) and node not in self.seen:
                self.seen.add(node)
                self.entry(match["entry"])["collected"] += 1
        self.write()

    def add(self, report: pytest.TestReport) -> None:
        match = NAMES.search(report.nodeid)
        if match is None or (report.when != "call" and not report.failed):
            return
        entry = self.entry(match["entry"])
        entry["seconds"] += report.duration
        name = report.nodeid.split("::")[-1]
        if report.failed:
            if name not in entry["failed"]:  # a worker that ends behind a failure is reported once more
                entry["failed"].append(name)
        elif report.skipped:
            entry["refused"][name] = str(report.longrepr[2]).removeprefix("Skipped: ")
        else:
            entry["passed"] += 1
            entry["checks"][match["check"]] = entry["checks"].get(match["check"], 0) + 1
        if time.monotonic() - self.written > EVERY:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        partial = self.path.with_suffix(".writing")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self.path)


def pytest_configure(config):
    if os.environ.get("TRISKELE_GPU_DRY") == "emulated":
        from gpu import emulation

        emulation.install()
    path = os.environ.get("TRISKELE_GPU_RECORD")
    config.stash[KEY] = Record(config, Path(path)) if path and not hasattr(config, "workerinput") else None


KEY = pytest.StashKey[Record | None]()


def _record(config) -> Record | None:
    return config.stash.get(KEY, None)


def pytest_collection_modifyitems(items):
    here = [i for i, item in enumerate(items) if item.path.is_relative_to(Path(__file__).parent)]  # not the rest's
    for i, item in zip(here, by_entry([items[i] for i in here])):
        items[i] = item


def pytest_collection_finish(session):
    if record := _record(session.config):
        record.collected([item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    if record := _record(node.config):
        record.collected(list(ids))


class Watch:
    """Reports carry no config: a plugin object that knows the record."""

    def __init__(self, record: Record):
        self.record = record

    def pytest_runtest_logreport(self, report):
        self.record.add(report)


def pytest_sessionstart(session):
    if record := _record(session.config):
        session.config.pluginmanager.register(Watch(record), "triskele-gpu-record")


_lost = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A kernel's illegal access meets every later call of its process: notice it where it happened."""
    global _lost
    report = yield
    if report.failed:
        _lost = _of_bench("gpu_supervise").context_is_lost(DEVICE)
    return report


def pytest_runtest_logfinish(nodeid):
    """The report is out: this process ends. With xdist another takes its place; without, the run ends here."""
    if _lost:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the CUDA context was lost in {nodeid}", 1)


def pytest_sessionfinish(session):
    if record := _record(session.config):
        record.write()
