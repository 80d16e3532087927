"""Records and the pages that are rendered from them; timing; comparing."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


MACHINE = dict(cpu="A CPU", cores=2, torch="2.13", kernel_level="avx2", commit="abc", dirty=True)


def record(**changes):
    row = dict(scene="video", name="plain", note="", seconds=2.0, ratio=1.0, weight_mb=3.25, rounds=20, rows=20,
               psnr=None, ssim=1.0, accuracy=0.9)
    return dict(kind="demo", when="2026-01-02T03:04:05+00:00", machine=MACHINE, rows=[row | changes])


def test_table_says_what_the_record_says(bench):
    render = bench("render")
    text = render.demo_table(record(name="linear", note="why", seconds=4.0, ratio=0.5, psnr=33.26), "video")
    assert "| linear (why) | 4.00 | 0.50× | 3.25 | 20 | 20 | 33.3 | 1.000 | 90% |" in text
    assert "A CPU, 2 threads, torch 2.13, kernels avx2, commit abc, 2026-01-02" in text
    assert "identical" in render.demo_table(record(), "video")
    assert "| plain |" not in render.demo_table(record(), "image")


def test_marked_tables_are_replaced_and_a_quick_check_is_no_record(bench, tmp_path, monkeypatch):
    render = bench("render")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    text = "before\n<!-- record: r.json scene=video -->\nstale\n<!-- end -->\nafter"
    assert render.NO_RECORD in render.rendered(text)
    (tmp_path / "r.json").write_text(json.dumps(record()))
    new = render.rendered(text)
    assert "stale" not in new and "| plain |" in new and new.startswith("before\n") and new.endswith("after")
    assert render.rendered(new) == new
    (tmp_path / "r.json").write_text(json.dumps(record() | {"quick": True}))
    with pytest.raises(ValueError, match="quick check"):
        render.rendered(text)


def test_tables_in_the_repository_are_those_of_their_records(bench):
    assert bench("render").main(["--check"]) == 0


def test_alternate_takes_turns_and_fast_calls_more_of_them(bench):
    timing = bench("timing")
    order = []
    found = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"),
                             seconds=0.0, least=4)
    assert order == ["a", "b"] * 5  # a warm-up of each, then four turns
    assert found["a"].samples == 4 and found["a"].min_ms <= found["a"].median_ms
    found = timing.alternate({"slow": lambda: timing.time.sleep(0.02), "fast": lambda: None}, torch.device("cpu"),
                             seconds=0.0, least=3, warm=True)
    assert found["slow"].samples == 3 and found["fast"].samples == 1 + 2 * 5


def test_rotating_uses_every_set_of_inputs(bench):
    timing = bench("timing")
    seen = []
    call = timing.rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_a_result_is_poisoned_after_it_is_timed(bench):
    timing = bench("timing")
    kept = torch.ones(4), [torch.ones(2, requires_grad=True), torch.ones(3, dtype=torch.int8)]
    timing.once(lambda: kept, torch.device("cpu"))
    assert kept[0].isnan().all() and kept[1][0].isnan().all() and (kept[1][1] == 1).all()
    with pytest.raises(RuntimeError, match="not finite"):
        bench("run")._check_result((torch.ones(2), torch.tensor([1.0, float("nan")])))


@pytest.mark.parametrize("elements", [1000, 20_000_000])
def test_a_value_that_is_not_written_shows_at_any_size(bench, elements):
    """80 MB too, which glibc would map anew, full of zeros."""
    timing, run = bench("timing"), bench("run")

    def half():
        out = torch.empty(elements)
        out[:elements // 2] = 1.0
        return out

    calls = {"triskele": half, "peer": lambda: torch.ones(elements)}
    timing.alternate(calls, torch.device("cpu"), seconds=0.0, least=3)
    with pytest.raises(RuntimeError, match="not finite"):
        run._check_call(half)
    run._check_call(calls["peer"])
    timing.release_freed_memory()


def test_the_replay_that_was_timed_is_checked(bench):
    """A graph's result is at one place: it was poisoned there, and a replay that does not write it shows."""
    run = bench("run")

    class Replay:
        result = torch.ones(4)

        def __call__(self):
            self.result[:self.written] = 1.0
            return self.result

    replay = Replay()
    replay.written = 4
    run._check_call(replay)
    replay.written = 3
    with pytest.raises(RuntimeError, match="not finite"):
        run._check_call(replay)

def test_a_call_runs_on_the_threads_that_it_asks_for(bench):
    timing = bench("timing")
    before, seen = torch.get_num_threads(), []
    timing.once(timing.OnThreads(lambda: seen.append(torch.get_num_threads()), 2), torch.device("cpu"))
    assert seen == [2] and torch.get_num_threads() == before


def bench_record(ratio, **changes):
    case = dict(name="op B1", group="op", label="An op", curves={"length, float32": 1.0}, unit="float32",
                timings={"triskele": {"median_ms": 2.0, "spread": 0.1}, "sdpa": {"median_ms": 2.0 * ratio}},
                ratios={"sdpa": ratio}, targets={"sdpa": 10.0}, absent={"fla": "not importable"}, flops=1.0, bytes=1.0,
                floor={"operations_ms": 1.0, "bytes_ms": 0.5}, of_floor=0.5) | changes
    ceilings = dict(copy_gb_s=10.0, float32_tflop_s=0.2, bfloat16_tflop_s=1.0, int8_tflop_s=2.0)
    return record() | {"kind": "bench", "cases": [case], "ceilings": ceilings}


def test_bench_tables_name_targets_floors_causes_and_absent_peers(bench, tmp_path, monkeypatch):
    tables = bench("tables_bench")
    monkeypatch.setattr(tables, "NOTES", tmp_path / "notes.json")
    text = tables.bench_table(bench_record(8.126))
    assert "| op B1 | 2.00 | 10% | 1.00 | 50% | 8.13× sdpa | 10× sdpa: missed |" in text
    assert "- op B1: 8.13× of 10× (sdpa). No cause noted yet." in text
    tables.NOTES.write_text(json.dumps({"op B1": "Bound by exp."}))
    assert "(sdpa). Bound by exp." in tables.bench_table(bench_record(8.126), "op")
    text = tables.bench_table(bench_record(11.0), "op")
    assert "10× sdpa: met" in text and "Missed" not in text
    assert tables.bench_table(bench_record(11.0), "other") == "*Not in the record.*"
    assert "| An op | 2.00 | 11.00× sdpa (10×) |" in tables.bench_table(bench_record(11.0), "summary")
    text = tables.bench_table(bench_record(11.0), "machine")
    assert "Absent peers: fla (not importable)." in text and "10.0 GB/s" in text and "not committed" in text


def test_a_row_whose_spread_stayed_large_is_flagged(bench, tmp_path, monkeypatch):
    tables = bench("tables_bench")
    monkeypatch.setattr(tables, "NOTES", tmp_path / "notes.json")
    taken = bench_record(11.0)
    assert "noisy" not in tables.bench_table(taken).lower()
    timings = taken["cases"][0]["timings"]
    timings["triskele"]["spread"] = 0.77
    text = tables.bench_table(taken)
    assert "| op B1 | 2.00 | 77%, **noisy** |" in text and "ours or of a target's peer: op B1 (ours 77%)." in text
    assert "| An op | 2.00, **noisy** | 11.00× sdpa (10×) |" in tables.bench_table(taken, "summary")
    timings["triskele"]["spread"] = 0.1
    timings["sdpa"]["spread"] = 0.3
    assert "op B1 (sdpa 30%)." in tables.bench_table(taken)
    taken["cases"][0]["targets"] = {}  # then nothing is claimed against it
    assert "noisy" not in tables.bench_table(taken).lower()
    timings |= {"sdpa": {"median_ms": 9.0, "spread": 0.5}, "sdpa flash": {"median_ms": 8.0, "spread": 0.1}}
    taken["cases"][0]["targets"] = {"the best sdpa": 2.0}  # that is "sdpa flash"
    assert bench("calm").spreads_of(timings, {"the best sdpa": 2.0}) == {"triskele": 0.1, "sdpa flash": 0.1}


def test_a_failed_case_is_shown_as_failed(bench):
    tables = bench("tables_bench")
    broken = bench_record(1.0)
    broken["cases"] = [dict(name="op B1", group="op", error="RuntimeError: a | b")]
    assert "| op B1 | failed | | | | RuntimeError: a / b | |" in tables.bench_table(broken, "op")
    assert "Failed cases: op B1." in tables.bench_table(broken, "machine")
    assert "op B1" not in tables.bench_table(broken, "summary")


def test_plots_are_redrawn_when_their_figures_change(bench, tmp_path):
    plots = bench("plots")
    two = bench_record(8.0)
    assert plots.curves(two) == {}  # one point is no curve
    two["cases"].append(bench_record(9.0, name="op B2", curves={"length, float32": 2.0})["cases"][0])
    assert plots.stale(two, tmp_path) == ["length-float32.svg"]
    (drawn,) = plots.draw(two, tmp_path)
    text = drawn.read_text()
    assert plots.stale(two, tmp_path) == [] and plots.draw(two, tmp_path) == []
    two["cases"][0]["timings"]["triskele"]["median_ms"] = 1.0
    assert plots.draw(two, tmp_path) == [drawn] and drawn.read_text() != text


def test_compare_tells_what_got_slower(bench, tmp_path, capsys):
    compare = bench("compare")
    for name, ratio in (("a", 8.0), ("b", 7.5), ("c", 5.0)):
        (tmp_path / name).write_text(json.dumps(bench_record(ratio)))
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "SLOWER" in capsys.readouterr().out


def test_compare_takes_turns_between_two_trees(bench, monkeypatch, capsys):
    compare = bench("compare")
    order = []

    def run_side(tree, out, options):
        order.append(tree.name)
        taken = bench_record(1.0)
        taken["cases"][0]["timings"]["triskele"]["median_ms"] = {"old": 2.0, "new": 4.0}[tree.name]
        return taken

    monkeypatch.setattr(compare, "run_side", run_side)
    monkeypatch.setattr(compare, "built_tree", lambda side: compare.contextmanager(lambda: iter([Path(side)]))())
    assert compare.main(["old", "new", "--turns", "2"]) == 1
    assert order == ["old", "new", "new", "old"]
    assert "0.50x" in capsys.readouterr().out
    assert compare.main(["new", "old", "--turns", "1"]) == 0


WHERE = """
import argparse, json, sys, triskele, triskele.triton_kernels, triskele.assets
parser = argparse.ArgumentParser()
parser.add_argument("--no-peers", action="store_true")
parser.add_argument("--out")
found = [triskele.__file__, triskele.triton_kernels.__file__, triskele.assets.__file__]
open(parser.parse_args().out, "w").write(json.dumps(found))
"""


def test_a_side_runs_on_its_trees_own_kernels_and_assets(bench, tmp_path, monkeypatch):
    """Also where another tree is installed: its finder would give its own for what lies outside python/."""
    compare = bench("compare")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").write_text(WHERE)
    trees = [tmp_path / name for name in ("old", "new")]
    parts = ("python/triskele", "triton_kernels", "assets")
    for tree in trees:
        for part in parts:
            (tree / part).mkdir(parents=True)
            (tree / part / "__init__.py").write_text("")
    for tree in (*trees, trees[0]):
        found = compare.run_side(tree, tmp_path / "out.json", [])
        assert [Path(file).resolve().parent for file in found] == [(tree / part).resolve() for part in parts]
    overlay = bench("gpu_environment").overlay
    for tree in trees:  # a folder that was another tree's
        found = overlay(tmp_path / "site", tree)
        assert (found / "triskele" / "triton_kernels").resolve() == (tree / "triton_kernels").resolve()


def test_notes_hold_causes_and_no_figures_that_no_record_holds(bench):
    notes = json.loads(bench("tables_bench").NOTES.read_text())
    for name, note in notes.items():
        words = [word for word in note.split() if word[0].isdigit() and not word.startswith("4-bit")]
        assert not words or "development reading" in note, f"{name}: {words}"


def test_long_clip_table_and_line(bench):
    tables = bench("tables")
    rows = [dict(name="plain", note="", dtype="float32", seconds=8.0, ratio=1.0, psnr=None, ssim=1.0,
                 profile_ms={"attention": 10.0, "rest": 2.0}),
            dict(name="SLA + W4A8", note="training-free", dtype="float32", seconds=2.0, ratio=4.0, psnr=20.04,
                 ssim=0.9)]
    rows.append(rows[1] | dict(name="SLA", ratio=3.9, seconds=2.05))  # the line is about both arms
    clip = dict(frames=128, tokens=8192, steps=4, turns=1, rows=rows)
    taken = record() | {"kind": "end_to_end", "clips": [clip]}
    text = tables.end_to_end_table(taken, None)
    assert "| SLA + W4A8 (training-free) | float32 | 2.00 | 4.00× | 20.0 | 0.900 |" in text
    assert "| plain | float32 | 10 | 2 | 12 |" in text
    line = tables.end_to_end_table(taken, "line")
    assert "8.0 s plain, 2.0 s with SLA + W4A8, training-free, 4.00×; 20.0 dB" in line and "alone" not in line
    rows[2] |= dict(ratio=5.0, seconds=1.6, psnr=21.0)  # and says so where one of them is faster without the other
    assert "SLA alone is faster: 1.6 s, 5.00×, 21.0 dB." in tables.end_to_end_table(taken, "line")
    rows[1]["spread"] = 0.3
    assert "| SLA + W4A8 (training-free) | float32 | 2.00, **noisy** |" in tables.end_to_end_table(taken, None)
