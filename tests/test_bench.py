"""Records and the tables that are rendered from them."""

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


def record(**changes):
    row = dict(scene="video", name="plain", note="", seconds=2.0, ratio=1.0, weight_mb=3.25, rounds=20, rows=20,
               psnr=None, ssim=1.0, accuracy=0.9)
    machine = dict(cpu="A CPU", cores=2, torch="2.13", kernel_level="avx2", commit="abc")
    return dict(kind="demo", when="2026-01-02T03:04:05+00:00", machine=machine, rows=[row | changes])


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
    (tmp_path / "r.json").write_text(json.dumps(record()))
    text = "before\n<!-- record: r.json scene=video -->\nstale\n<!-- end -->\nafter"
    new = render.rendered(text)
    assert "stale" not in new and "| plain |" in new and new.startswith("before\n") and new.endswith("after")
    assert render.rendered(new) == new
    (tmp_path / "r.json").write_text(json.dumps(record() | {"quick": True}))
    with pytest.raises(ValueError, match="quick check"):
        render.rendered(text)


def test_tables_in_the_repository_are_those_of_their_records(bench, monkeypatch):
    render = bench("render")
    monkeypatch.setattr(sys, "argv", ["render.py", "--check"])
    assert render.main() == 0


def test_alternate_takes_turns(bench):
    timing = bench("timing")
    order = []
    found = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"),
                             seconds=0.0, least=4)
    assert order == ["a", "b"] * 5  # a warm-up of each, then four turns
    assert found["a"].samples == 4 and found["a"].min_ms <= found["a"].median_ms


def test_rotating_uses_every_set_of_inputs(bench):
    timing = bench("timing")
    seen = []
    call = timing.rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_every_case_states_its_work(bench):
    registry = bench("registry")
    names = [case.name for case in registry.cases("curves")]
    assert len(names) == len(set(names)) and {c.group for c in registry.cases()} >= {"sla_forward", "svdq_linear"}
    calls = registry.sla_forward(torch.float32, 1, 1, 256, 16, 0.5).make(torch.device("cpu"))
    assert calls.flops > 0 and calls.bytes > 0 and "sdpa" in calls.peers
    assert calls.ours().shape == (1, 1, 256, 16)


def bench_record(ratio):
    case = dict(name="op B1", group="op", dtype="float32", timings={"triskele": {"median_ms": 2.0}},
                ratios={"sdpa": ratio}, targets={"sdpa": 10.0}, absent={"fla": "not importable"}, flops=1.0, bytes=1.0,
                floor={"operations_ms": 1.0, "bytes_ms": 0.5}, of_floor=0.5)
    ceilings = dict(copy_gb_s=10.0, float32_tflop_s=0.2, bfloat16_tflop_s=1.0)
    return record() | {"kind": "bench", "cases": [case], "ceilings": ceilings}


def test_bench_table_names_targets_floors_and_absent_peers(bench):
    text = bench("render").bench_table(bench_record(8.126))
    assert "| op B1 | 2.00 | 1.00 | 50% | 8.13× sdpa (10×) |" in text
    assert "Absent peers: fla (not importable)." in text and "copy 10.0 GB/s" in text


def test_compare_tells_what_got_slower(bench, tmp_path, capsys):
    compare = bench("compare")
    for name, ratio in (("a", 8.0), ("b", 7.5), ("c", 5.0)):
        (tmp_path / name).write_text(json.dumps(bench_record(ratio)))
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "SLOWER" in capsys.readouterr().out
