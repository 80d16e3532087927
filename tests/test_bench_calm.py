"""A record is no noise: what is measured again, and which time is kept; by a clock that the calls themselves move."""

import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CEILING = dict(copy_gb_s=10.0, float32_tflop_s=0.1)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, seconds):
        """A call that takes these, one after the other."""
        left = iter(seconds)

        def call():
            self.now += next(left)
            return torch.ones(2)

        return call


QUIET, LOUD = [5e-4] * 5, [5e-4, 15e-4, 5e-4, 15e-4, 10e-4]  # the five turns of one measurement


def measured(bench, monkeypatch, ours, peer=(), targets=None):
    """The row of a case whose turns take these seconds, measurement by measurement."""
    run, case, clock = bench("run"), bench("case"), Clock()
    monkeypatch.setattr(bench("timing"), "time", clock)

    def forever(turns):  # after one warm-up
        return clock.taking(itertools.chain([5e-4], *turns, itertools.repeat(5e-4)))

    def make(_device):
        return case.Calls(forever(ours), {"peer": forever(peer)}, {}, 1.0, 1.0, "float32")

    return run.measure(case.Case("c", "g", make, targets or {}), CPU, CEILING, 0.0)


def test_a_target_case_is_measured_again_while_it_is_noisy(bench, monkeypatch):
    target = {"peer": 1.0}
    row = measured(bench, monkeypatch, [LOUD, QUIET], targets=target)
    assert row["repeats"] == 2 and row["timings"]["triskele"]["median_ms"] == pytest.approx(0.5)
    assert row["timings"]["triskele"]["spread"] == pytest.approx(0.0, abs=1e-6)
    assert measured(bench, monkeypatch, [QUIET], targets=target)["repeats"] == 1
    row = measured(bench, monkeypatch, [], [LOUD, LOUD, QUIET], targets=target)  # the peer's noise counts as well
    assert row["repeats"] == 3 and row["ratios"]["peer"] == pytest.approx(1.0)
    assert measured(bench, monkeypatch, [LOUD])["repeats"] == 1  # no target, no claim
    assert measured(bench, monkeypatch, [], [LOUD], targets={"other": 1.0})["repeats"] == 1


def test_the_calmest_of_noisy_measurements_is_kept_and_flagged(bench, monkeypatch):
    calmer = [6e-4, 8e-4, 7e-4, 9e-4, 6e-4]
    row = measured(bench, monkeypatch, [LOUD, calmer, LOUD, QUIET], targets={"peer": 1.0})
    assert row["repeats"] == 3 and row["timings"]["triskele"]["median_ms"] == pytest.approx(0.7)
    assert bench("calm").noisy(row) == "ours 29%"
    assert "(noisy: ours 29%)" in bench("run").describe(row)


def test_a_very_slow_peer_does_not_shorten_the_others(bench, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench("timing"), "time", clock)

    def timings(**seconds):
        calls = {name: clock.taking(itertools.repeat(value)) for name, value in seconds.items()}
        return bench("timing").alternate(calls, CPU, seconds=2.0, warm=True)

    found = timings(ours=0.5, dense=0.5, scores=9.0)
    assert found["scores"].samples == 3 and found["dense"].samples >= 5 and found["ours"].samples >= 5
    assert found["scores"].median_ms == pytest.approx(9000) and found["ours"].median_ms == pytest.approx(500)
    found = timings(ours=3.0, dense=9.0)
    assert found["ours"].samples == found["dense"].samples == 3


@pytest.mark.parametrize("seconds, turns", [
    ([1.0] * 6, 3), ([1.0, 1.1, 1.0, 9.0], 3), ([1.0, 2.0, 1.0, 1.0, 9.0], 4), ([1.0, 2.0, 1.0, 2.0, 1.0, 2.0], 6)])
def test_a_clips_turns_go_on_while_they_disagree(bench, monkeypatch, seconds, turns):
    end_to_end, clock = bench("end_to_end"), Clock()
    variants = [end_to_end.Variant("plain"), end_to_end.Variant("other", {"attention": None})]
    calls = [clock.taking([100.0, *itertools.repeat(1.0, 9)]), clock.taking([100.0, *seconds])]  # warm-ups first

    def generate(call, frames, steps):
        call()
        return np.zeros((frames, 8, 8, 3))

    pipes = dict(zip(("plain", "other"), calls))
    monkeypatch.setattr(end_to_end, "prepared", lambda variant: pipes[variant.name])
    monkeypatch.setattr(end_to_end, "generate", generate)
    monkeypatch.setattr(end_to_end, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    monkeypatch.setattr(end_to_end, "psnr", lambda *_: 0.0)
    monkeypatch.setattr(end_to_end, "ssim", lambda *_: 0.0)
    clip = end_to_end.measure(variants, 4, 1, 3, False)
    assert clip["turns"] == turns and clip["rows"][1]["all_seconds"] == pytest.approx(seconds[:turns])
    assert clip["rows"][0]["spread"] == pytest.approx(0.0) and clip["rows"][1]["spread"] >= 0.0
