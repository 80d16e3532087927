"""ParaTAA inside pipelines: the choice of a window, and what is said where it does not pay."""

from __future__ import annotations

import logging

import pytest
import torch
from sampler_runs import TIGHT, assert_same, one_thread  # noqa: F401  (a fixture)
from tiny import flux_call, flux_pipeline, unet_call, unet_pipeline

import triskele as tk
from triskele.diffusers import pace


def test_choose_takes_a_window_where_rows_are_free_and_none_where_they_cost():
    asked = []

    def free(rows):
        asked.append(rows)
        return 1.0

    found, line = pace.choose(free, 50)
    assert found.window == 16 and asked == [1, 1, 4, 8, 16, 32] and "window 16, expected 5.6x" in line
    found, line = pace.choose(lambda rows: float(rows), 50)
    assert found.window is None and "sequential sampling is faster" in line and "\n" not in line
    found, _ = pace.choose(lambda rows: max(1.0, rows / 8), 50)
    assert found.window == 8


def test_choose_stops_at_the_memory():
    def seconds(rows):
        if rows > 4:
            raise torch.OutOfMemoryError("no")
        return 1.0

    found, line = pace.choose(seconds, 50)
    assert found.window == 4 and "do not fit" in line


@pytest.mark.parametrize("cost, parallel", [(0.0, True), (1.0, False)])
def test_auto_measures_once_a_shape(monkeypatch, caplog, cost, parallel):
    from triskele.diffusers.rounds import Run

    asked = []

    def timed(self, call, window):
        asked.append(window)
        return 1e3 + 1e3 * cost * (window - 1)

    monkeypatch.setattr(Run, "_timed", timed)
    pipe = unet_pipeline()
    want = unet_call(pipe, steps=16)
    config = tk.ParaTAA(window="auto", **TIGHT)
    with tk.patch(pipe, sampler=config) as handle, caplog.at_level(logging.INFO, "triskele"):
        for _ in range(2):
            got = unet_call(pipe, steps=16)
            assert_same(got, want)
            assert bool(handle.sampler.last) == parallel
            assert parallel or torch.equal(got, want)
    assert asked == ([1, 1, 4, 8] if parallel else [1, 1, 4])
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == (logging.INFO if parallel else logging.WARNING)


def test_auto_really_measures_and_keeps_the_result():
    pipe = flux_pipeline()
    want = flux_call(pipe, steps=6)
    with tk.patch(pipe, sampler=tk.ParaTAA(**TIGHT)):
        assert_same(flux_call(pipe, steps=6), want)
        assert_same(flux_call(pipe, steps=6), want)


@pytest.mark.parametrize("window, then", [(4, 1), ("auto", 0)])
def test_slower_than_sequential_is_said_once(monkeypatch, caplog, window, then):
    from triskele.diffusers.rounds import Run

    monkeypatch.setattr(Run, "_timed", lambda self, call, rows: 1e-6 / rows)
    pipe = unet_pipeline()
    with tk.patch(pipe, sampler=tk.ParaTAA(window=window)) as handle, caplog.at_level(logging.WARNING, "triskele"):
        for _ in range(2):
            unet_call(pipe, steps=6)
        assert len(handle.sampler.last) == then
    lines = [r.message for r in caplog.records]
    assert len(lines) == 1 and "6 sequential steps would take about" in lines[0]
