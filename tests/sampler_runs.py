"""What the tests of ParaTAA inside pipelines share: a tight tolerance, and the sequential run to compare with."""

from __future__ import annotations

import pytest
import torch

import triskele as tk

TIGHT = dict(tolerance=1e-7)
STEPS = 8


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(got, want, tolerance=1e-4):
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = max(1.0, float(want.abs().max()))
    assert float((got - want).abs().max()) <= tolerance * scale


def parallel_equals_sequential(pipe, call, steps=STEPS, window=4, config=None, **kwargs):
    """Runs both; returns the SampleRuns."""
    want = call(pipe, steps=steps, **kwargs)
    with tk.patch(pipe, sampler=config or tk.ParaTAA(window=window, **TIGHT)) as handle:
        got = call(pipe, steps=steps, **kwargs)
        runs = list(handle.sampler.last)
    assert_same(got, want)
    assert all(run.converged for run in runs) and len(runs) > 0
    assert torch.equal(call(pipe, steps=steps, **kwargs), want)
    return runs
