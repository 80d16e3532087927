"""Every kind of case at a tiny size: it runs, says its work, and agrees with its exact peers; a failure is recorded."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import triskele as tk

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CEILING = dict(copy_gb_s=10.0, float32_tflop_s=0.1, bfloat16_tflop_s=0.1, int8_tflop_s=0.1)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


def test_the_cases_of_the_issue_are_there(bench):
    registry = bench("registry")
    cases = registry.cases("curves", "cpu")
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    groups = {case.group for case in cases}
    assert groups >= {"sla_forward", "sla_backward", "sla_route", "vmoba", "svdq_linear", "taa_step", "threads"}
    assert {case.name for case in registry.cases("short", "cpu")} < set(names)
    targets = {case.name: case.targets for case in cases}
    assert targets["sla_forward all float32 B1 H8 L8192 D64 keep 0.1"] == {"sdpa": 10.0}
    assert targets["sla_backward bfloat16 B1 H8 L8192 D64 keep 0.1"] == {"sdpa": 6.0}
    assert targets["svdq_linear bfloat16 M1024 K3072 N3072 r32"] == {"torch bfloat16": 1.3, "torch float32": 4.0}
    assert targets["taa_step float32 T100 4x64x64"] == {"published step in torch": 10.0, "copy of as many bytes": 0.5}
    for rows in (1, 16, 1024):  # each case of a target, with both kinds of scales
        name = f"svdq_linear bfloat16 M{rows} K3072 N3072 r32"
        assert targets[f"{name} integer scales"] == targets[name]
    assert "svdq_linear_gelu bfloat16 M1024 K3072 N12288 r32" in names
    assert all(case.targets == {"one thread": 1.8} for case in cases if case.group == "threads")
    assert not any(case.group == "threads" for case in registry.cases("short", "cuda"))
    axes = {axis for case in cases for axis in case.curves}
    assert axes >= {"length, float32", "length, bfloat16", "keep, float32", "head_dim, float32", "M",
                    "M, integer scales"}


def tiny(bench):
    attention, linear, sampling = (bench(f"cases_{name}") for name in ("attention", "linear", "sampling"))
    f32, b16 = torch.float32, torch.bfloat16
    found = [attention.sla_forward(f32, 1, 2, 256, 16, 0.5), attention.sla_forward(b16, 1, 1, 256, 16, 1.0, "marginal"),
             attention.sla_backward(f32, 1, 1, 256, 16, 0.5), attention.routing(b16, 1, 1, 256, 16, 0.5),
             attention.vmoba_forward(f32, 1, 256, 16, 0.25), attention.vmoba_backward(f32, 1, 256, 16, 0.25),
             linear.svdq_linear(b16, 3, 128, 64, rank=16),
             linear.svdq_linear(b16, 3, 128, 64, 16, "integer", activated=True), sampling.taa_step(6, (1, 4, 4))]
    found.append(bench("case").thread_scaling(found[0]))
    if hasattr(tk.ops, "adaln_modulate"):
        found += [sampling.adaln_modulate(f32, 2, 8, 32), sampling.gate_residual(b16, 2, 8, 32)]
    return found


def test_every_kind_of_case_measures_itself(bench, monkeypatch):
    run = bench("run")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # seconds each; flex has its own test
    for case in tiny(bench):
        row = run.measured(case, CPU, CEILING, 0.0)
        assert "error" not in row, row
        assert row["flops"] > 0 and row["bytes"] > 0 and row["of_floor"] > 0
        assert set(row["ratios"]) | set(row["absent"]) and set(row["targets"]) <= {*row["ratios"], *row["absent"]}
        assert not [why for why in row["absent"].values() if why.startswith("fails here")], row["absent"]
        json.dumps(row)


def test_flex_attention_gets_the_blocks_that_ours_keeps(bench, monkeypatch):
    """Uncompiled it reads the same block mask; without a linear branch the two agree."""
    peers, case = bench("peers_attention"), bench("case")
    inputs = case.drifting(CPU, torch.float32, 1, 2, 256, 16)
    maps = [tk.ops.route_blocks(q, k, keep=0.5, block_q=128, block_k=64) for q, k, _ in inputs]
    seen = []

    def flex(q, k, v, block_mask):
        seen.append(block_mask)
        return q

    monkeypatch.setattr(torch, "compile", lambda function, **_: flex)
    call = peers.flex(inputs, maps, 128, 64)
    call()
    dense = torch.zeros_like(maps[0])
    mask = seen[0]
    for h in range(2):
        for i in range(dense.shape[2]):
            kept = mask.full_kv_indices[0, h, i, :mask.full_kv_num_blocks[0, h, i]]
            dense[0, h, i, kept.long()] = 1
    assert torch.equal(dense, (maps[0] == 1).to(dense.dtype)) and mask.BLOCK_SIZE == (128, 64)
    assert int(mask.kv_num_blocks.sum()) == 0  # no block is masked in part


def test_routing_peer_chooses_the_same_blocks(bench):
    peers, case = bench("peers_attention"), bench("case")
    inputs = [(q, k) for q, k, _ in case.drifting(CPU, torch.float32, 1, 2, 320, 16, sets=1)]
    (call,) = peers.routing(inputs, 0.5, 128, 64).values()
    assert torch.equal(call(), tk.ops.route_blocks(*inputs[0], keep=0.5, block_q=128, block_k=64).view(2, 3, 5))


def test_int8_peers_compute_the_linear(bench):
    peers = bench("peers_linear")
    x, weight, bias = torch.randn(4, 64), torch.randn(32, 64) / 8, torch.randn(32)
    calls, absent = peers.linear([(x,)], weight, bias)
    exact = torch.nn.functional.linear(x, weight, bias)
    for name in ("torch float32", "torch bfloat16", "oneDNN int8 (W8A8)"):
        torch.testing.assert_close(calls[name]().float(), exact, atol=0.08, rtol=0.05)
    assert "gemlite" in absent or "gemlite" in calls


def test_a_failing_case_is_recorded_and_the_run_goes_on(bench, tmp_path, monkeypatch, capsys):
    run, case = bench("run"), bench("case")

    def broken(_device):
        raise RuntimeError("no kernel\nmore lines")

    def works(_device):
        peers = {"bad": lambda: torch.ones(2) @ torch.ones(3), "good": lambda: torch.ones(2)}
        return case.Calls(lambda: torch.ones(2), peers, {}, 1.0, 1.0, "float32")

    known = [case.Case("first", "g", broken), case.Case("second", "g", works)]
    monkeypatch.setattr(run.registry, "cases", lambda *_: known)
    monkeypatch.setattr(run, "ceilings", lambda _: CEILING)
    out = tmp_path / "r.json"
    assert run.main(["--seconds", "0", "--out", str(out), "--device", "cpu"]) == 1
    record = json.loads(out.read_text())
    first, second = record["cases"]
    assert first == {"name": "first", "group": "g", "error": "RuntimeError: no kernel"}
    assert list(second["ratios"]) == ["good"] and second["absent"]["bad"].startswith("fails here: RuntimeError")
    assert record["machine"]["cpu_features"] is not None and {"commit", "dirty", "torch"} <= set(record["machine"])
    assert not list(tmp_path.glob("*.partial")) and "FAILED" in capsys.readouterr().out
    known.pop(0)
    assert run.main(["--seconds", "0", "--out", str(out), "--device", "cpu", "--no-peers"]) == 0
    assert json.loads(out.read_text())["cases"][0]["ratios"] == {}


def test_only_leaves_the_full_record_alone(bench, monkeypatch):
    run = bench("run")
    monkeypatch.setattr(run, "ceilings", lambda _: CEILING)
    monkeypatch.setattr(run, "measured", lambda case, *_, **__: {"name": case.name, "group": "", "error": "x"})
    monkeypatch.setattr(run.Progress, "finish", lambda *_: pytest.fail("wrote a record"))
    assert run.main(["--only", "sla_route", "--device", "cpu"]) == 1
    with pytest.raises(SystemExit):
        run.main(["--only", "nothing", "--device", "cpu"])


def test_long_clip_compares_with_the_plain_pipeline_of_its_dtype(bench, tmp_path, monkeypatch):
    end_to_end = bench("end_to_end")
    all_of_them = end_to_end.variants()
    assert [v.dtype for v in all_of_them if v.plain] == [torch.float32, torch.bfloat16]
    w4a8 = end_to_end.Variant("W4A8", {"linear": tk.SVDQuant(rank=16, include=("ffn.net.2",), iterations=1)})
    monkeypatch.setattr(end_to_end, "variants", lambda: [*all_of_them[:2], w4a8, all_of_them[6]])
    out = tmp_path / "e.json"
    arguments = ["--frames", "4", "--steps", "1", "--turns", "1", "--dtypes", "float32", "--out", str(out)]
    assert end_to_end.main(arguments) == 0
    (clip,) = json.loads(out.read_text())["clips"]
    assert clip["tokens"] == 256 and clip["rows"][0]["ratio"] == 1.0
    plain, *others = clip["rows"]
    assert [row["name"] for row in others] == [all_of_them[1].name, "W4A8"]  # bfloat16 was not asked for
    assert plain["psnr"] is None and all(row["psnr"] > 10 and row["ssim"] < 1 for row in others)
    for row in clip["rows"]:
        times = row["profile_ms"]
        assert times["attention"] > 0 and times["linear"] > 0
        assert times["rest"] < 0.5 * sum(times.values())


def test_scales_quality_leaves_a_table(bench, tmp_path, monkeypatch):
    quality, tables = bench("scales_quality"), bench("tables")
    rows = [{"model": "m", "site": "a", "calibrated": c, "amax": {"int8": 0.1}, "integer": {"int8": 0.1 * f}}
            for c, f in ((False, 0.5), (False, 2.0), (True, 0.9))]
    whole = [{"model": "m", "rank": 8, "amax": 0.02, "integer": 0.01}]
    monkeypatch.setattr(quality, "model_layers", lambda _: rows)
    monkeypatch.setattr(quality, "whole_models", lambda _: whole)
    out = tmp_path / "s.json"
    quality.main(["--rows", "32", "--columns", "128", "--tokens", "64", "--iterations", "1", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["kind"] == "scales" and len(record["random"]) == 8
    assert all(0 < row[scales][kind] < 0.2 for row in record["random"] for scales in ("amax", "integer")
               for kind in ("int8", "exact"))
    table = tables.scales_table(record)
    assert "| digits, m | 2 | 1.000 | 0.500 | 2.000 |" in table and "| digits, m, calibrated | 1 | 0.900 |" in table
    assert "amax → integer | rank 8 |" in table and "| digits, m | 2.00% → 1.00% |" in table
    assert "Student t" in table and record["machine"]["torch"] in table
