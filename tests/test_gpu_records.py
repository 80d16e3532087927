"""Records of a GPU run: what verifies a kernel and what does not, and the tables that are made of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from triskele.backend import VERIFIED

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


# ------------------------------------------------------------------------------------------------ verified

def good_record(bench):
    """What a run that passed would leave for the ops that have a CUDA backend."""
    sources = bench("gpu_sources")
    entry = dict(collected=9, passed=8, failed=[], refused={"one": "takes head dimensions up to 128"}, complete=True,
                 seconds=1.0, checks={"accuracy": 4, "bits": 2, "graph": 1, "stream": 1})
    results = {f"{op}/{backend}": entry | {"sources": sources.current(op, backend)}
               for op, backend in sources.gpu_backends() if not op.startswith("test.")}
    return {"kind": "gpu_tests", "dry": False, "when": "2026-01-02T03:04:05+00:00", "architecture": "sm90",
            "whole_suite": True, "machine": dict(gpu="A GPU", cpu="A CPU", driver="1", commit="abc", torch="2.11"),
            "results": results}


def written(path: Path, record: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def test_a_run_that_passed_verifies(bench, tmp_path):
    verify = bench("verify")
    record = good_record(bench)
    assert "taa.update/cuda" in record["results"]
    path = written(tmp_path / "a" / "tests.json", record)
    older = written(tmp_path / "b" / "tests.json", record | {"architecture": "sm80"})
    found, refusals = verify.verified([path, older])
    assert not refusals and set(found) == set(record["results"])
    assert found["taa.update/cuda"] == {"sm90": str(path), "sm80": str(older)}
    out = tmp_path / "verified.json"
    assert verify.main(["--records", str(path), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["taa.update/cuda"] == {"sm90": str(path)}
    assert verify.main(["--check", "--records", str(path), "--out", str(out)]) == 0
    assert verify.main(["--check", "--records", "--out", str(out)]) == 1  # the record is gone


@pytest.mark.parametrize("change, reason", [
    (dict(dry=True), "is a dry run"), (dict(kind="bench"), "expected 'gpu_tests'"),
    (dict(architecture=None), "is of architecture None"),
    (dict(machine=dict(cpu="A CPU", commit="abc")), "does not name the gpu"),
    (dict(machine=dict(gpu="A GPU", driver="1", commit="unknown")), "does not name the commit"),
])
def test_a_record_that_verifies_nothing(bench, tmp_path, change, reason):
    found, refusals = bench("verify").verified([written(tmp_path / "tests.json", good_record(bench) | change)])
    assert not found and any(reason in line for line in refusals)


@pytest.mark.parametrize("change, reason", [
    (dict(failed=["accuracy[x]"], passed=7), "1 tests failed, such as accuracy"),
    (dict(passed=7), "8 of 9 tests ran to their end"), (dict(complete=False), "ran to their end"),
    (dict(checks={"accuracy": 8}), "no test of bits, graph, stream passed"),
    (dict(sources=None), "did not say what it was built from"), (dict(sources="0" * 64), "have changed since"),
])
def test_an_entry_that_is_not_verified(bench, tmp_path, change, reason):
    record = good_record(bench)
    record["results"]["taa.update/cuda"] |= change
    found, refusals = bench("verify").verified([written(tmp_path / "tests.json", record)])
    assert "taa.update/cuda" not in found and "taa.gamma/cuda" in found
    (line,) = refusals
    assert "taa.update/cuda" in line and reason in line
    record["results"] = {"taa.update/opencl": record["results"]["taa.gamma/cuda"]}
    found, refusals = bench("verify").verified([written(tmp_path / "tests.json", record)])
    assert not found and "no such entry" in refusals[0]


def test_a_finding_of_the_sanitizer_stands_against_its_op(bench, tmp_path):
    verify, record = bench("verify"), good_record(bench)
    names = sorted(record["results"])
    path = written(tmp_path / "tests.json", record)
    output = "\n".join([
        "========= COMPUTE-SANITIZER", f"{names[0]}: 2 calls", "========= Invalid __global__ write of size 4",
        "=========     at kernel+0x10", f"{names[1]}: 2 calls", f"{names[2]}: 1 calls", "5 calls in all",
        "========= ERROR SUMMARY: 1 error"])
    found = bench("gpu_sanitizer").blamed(output)
    assert found == [names[1]]
    assert bench("gpu_sanitizer").blamed("========= Race reported\n========= RACECHECK SUMMARY: 1 hazard") == ["?"]
    run = {"tool": "memcheck", "result": "errors found", "blamed": found}
    written(tmp_path / "sanitizer.json", {"runs": [run, run | {"result": "clean", "blamed": []}]})
    entries, refusals = verify.verified([path])
    assert set(names) - set(entries) == {names[1]} and "memcheck found errors" in refusals[0]
    for unnamed in ([], ["?"]):
        written(tmp_path / "sanitizer.json", {"runs": [run | {"blamed": unnamed}]})
        assert verify.verified([path])[0] == {}


def test_a_changed_kernel_changes_its_familys_fingerprint_alone(bench):
    sources = bench("gpu_sources")
    files = {"csrc/check.h": "a", "csrc/cuda/common/launch.cuh": "b", "csrc/cuda/taa_update_sm80.cu": "c",
             "csrc/cuda/sla_route_sm80.cu": "d", "csrc/cpu/taa.cpp": "e", "triton_kernels/sla_route.py": "f",
             "triton_kernels/configs.py": "g"}

    def moved(path):
        changed = files | {path: "z"}
        pairs = [("taa.update", "cuda"), ("sla.route", "cuda"), ("sla.route", "triton"), ("taa.update", "triton")]
        return [sources.fingerprint(*pair, files) != sources.fingerprint(*pair, changed) for pair in pairs]

    assert moved("csrc/cuda/taa_update_sm80.cu") == [True, False, False, False]
    assert moved("csrc/cuda/sla_route_sm80.cu") == [False, True, False, False]
    assert moved("csrc/cuda/common/launch.cuh") == moved("csrc/check.h") == [True, True, False, False]
    assert moved("triton_kernels/sla_route.py") == [False, False, True, False]
    assert moved("triton_kernels/configs.py") == [False, False, True, True]
    assert moved("csrc/cpu/taa.cpp") == [False] * 4
    assert sources.fingerprint("taa.update", "cuda", None) is None


@pytest.mark.parametrize("path, stale", [
    ("python/triskele/ops/svdq/cuda_backend.py", {"svdq/cuda"}),
    ("python/triskele/ops/sla/cuda_route_backend.py", {"sla/cuda"}),
    ("python/triskele/ops/vmoba/triton_backend.py", {"vmoba/triton"}),
    ("python/triskele/ops/taa/backends.py", {"taa/cuda", "taa/triton"}),
    ("python/triskele/ops/adaln/reference.py", {"adaln/cuda", "adaln/triton"}),
    ("python/triskele/quantize/formats.py", {"svdq/cuda", "svdq/triton"}),  # pads what the kernels get
    ("python/triskele/backend.py", set()), ("python/triskele/nn/__init__.py", set())])
def test_a_changed_launcher_makes_its_entry_stale(bench, path, stale):
    sources = bench("gpu_sources")
    files = sources.on_disk()
    assert path in files
    changed = files | {path: "other"}
    ops = {f"{op.split('.')[0]}/{backend}": (op, backend) for op, backend in sources.gpu_backends()}
    moved = {name for name, pair in ops.items()
             if sources.fingerprint(*pair, files) != sources.fingerprint(*pair, changed)}
    assert moved == stale


def test_what_runs_is_the_librarys_kernels_and_the_trees_launchers(bench, monkeypatch):
    sources = bench("gpu_sources")
    monkeypatch.setattr(sources, "built_from", lambda: {
        path: digest for path, digest in sources.on_disk().items() if path.startswith("csrc/")})
    assert sources.running("sla.forward", "cuda") == sources.current("sla.forward", "cuda")
    monkeypatch.setattr(sources, "built_from", lambda: None)
    assert sources.running("sla.forward", "cuda") is None
    assert sources.running("sla.forward", "triton") == sources.current("sla.forward", "triton")


def test_imports_are_followed(bench, tmp_path, monkeypatch):
    sources = bench("gpu_sources")
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    text = ("from . import c\nfrom ..d import e\nfrom triskele.ops.f import g\nimport os\n"
            "def h():\n    import triskele.i.j\n    from triskele import backend\n")
    for name in ("ops/a/b.py", "ops/a/c.py", "ops/d.py", "ops/f/__init__.py", "i/j.py", "backend.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text if name == "ops/a/b.py" else "")
    found = {str(path.relative_to(tmp_path)) for path in sources._imported(tmp_path / "ops" / "a" / "b.py")}
    assert found == {"ops/a/c.py", "ops/d.py", "ops/f/__init__.py", "i/j.py"}


def test_the_library_of_other_sources_is_stale(bench, monkeypatch):
    build, sources = bench("gpu_build"), bench("gpu_sources")
    now = {path: digest for path, digest in sources.on_disk().items() if path.startswith("csrc/")}
    monkeypatch.setattr(sources, "built_from", lambda: dict(now))
    assert build.stale() == []
    monkeypatch.setattr(sources, "built_from", lambda: now | {"csrc/check.h": "other", "csrc/cpu/taa.cpp": "other"})
    assert build.stale() == ["csrc/check.h has changed since the build"]
    monkeypatch.setattr(sources, "built_from", lambda: None)
    assert "does not say" in build.stale()[0]


def test_verified_json_is_what_the_records_say(bench):
    assert bench("verify").main(["--check"]) == 0
    named = {(name.split("/")[0], name.split("/")[1]) for name in json.loads(VERIFIED.read_text())}
    assert named <= set(bench("gpu_sources").gpu_backends())
    files = (ROOT / "python" / "triskele" / "ops").rglob("*.py")
    typed = [path for path in files if "verified=(\"" in path.read_text()]
    assert not typed, "verified is read from verified.json"


# ------------------------------------------------------------------------------------------------ arms and tables

def test_our_reference_is_never_timed_as_ours(bench):
    arms = bench("gpu_arms")
    q = torch.randn(1, 1, 64, 8)

    def through(backend):
        return lambda: importlib.import_module("triskele").ops.route_blocks(q, q, keep=0.5, backend=backend)

    found, refused = arms.arms(through("reference"), torch.device("cpu"))
    assert not found and "only the reference" in refused["cpu"]
    found, refused = arms.arms(through("auto"), torch.device("cpu"))
    assert found["cpu"].chosen == {"sla.route": "cpu"} and not refused

    def broken():
        raise RuntimeError("illegal address")

    with pytest.raises(RuntimeError, match="no backend runs it: cpu fails here: RuntimeError: illegal address"):
        arms.calls(broken, torch.device("cpu"), peers={}, absent={}, flops=1.0, bytes=1.0, unit="float32")
    run_py = bench("run")
    assert run_py.failed({"absent": {"triskele triton": "fails here: X"}}) and run_py.failed({"error": "x"})
    assert not run_py.failed({"absent": {"torchao": "fails here: X", "triskele triton": "refused: takes float16"}})


def test_ncus_csv_is_read_by_launch(bench):
    text = ('==PROF== Connected\n"ID","Process ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name",'
            '"Metric Unit","Metric Value"\n'
            '"0","7","sla_forward","(384, 1, 1)","(132, 1, 1)","GPU Speed Of Light","Duration","us","801.2"\n'
            '"0","7","sla_forward","(384, 1, 1)","(132, 1, 1)","Launch Statistics","Registers Per Thread","","168"\n'
            '"1","7","route","(128, 1, 1)","(9, 1, 1)","GPU Speed Of Light Throughput","Duration","us","20.5"\n')
    launches = bench("gpu_ncu").parsed(text)
    assert [launch["kernel"] for launch in launches] == ["sla_forward", "route"]
    assert launches[0]["counters"]["Launch Statistics, Registers Per Thread"] == "168"
    lines = bench("gpu_report").ncu_lines({"launches": launches})
    assert lines[0] == "sla_forward: time 801.2 us, registers 168"
    assert bench("gpu_ncu").parsed("no permission") == []


def test_tables_of_a_gpus_records(bench, tmp_path, monkeypatch):
    render = bench("render")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    text = "<!-- record: bench/results/*/bench.json -->\nold\n<!-- end -->"
    assert render.NO_GPU_RECORD in render.rendered(text)
    case = dict(name="sla_forward", group="sla_forward", timings={"triskele": {"median_ms": 0.7512}},
                ratios={"the best sdpa": 13.5}, targets={"the best sdpa": 13.0}, floor={"bytes_ms": 0.23},
                of_floor=0.31, absent={"torchao": "not importable"},
                backends={"sla.forward": "cuda", "sla.route": "cuda"})
    ceilings = dict(copy_gb_s=3000.0, float32_tflop_s=50.0, bfloat16_tflop_s=798.0, int8_tflop_s=1500.0)
    record = good_record(bench) | {"kind": "bench", "ceilings": ceilings, "left_out": ["late"], "cases": [
        case, dict(name="broken", group="x", error="RuntimeError: a | b")]}
    record.pop("dry")
    written(tmp_path / "bench" / "results" / "h100" / "bench.json", record)
    made = render.rendered(text)
    assert "| sla_forward | cuda | 0.7512 | 0.2300 | 31% | 13.50× the best sdpa | 13× the best sdpa: met |" in made
    assert "| broken | | failed | | | RuntimeError: a / b | |" in made
    assert "Absent: torchao (not importable)." in made and "not measured: late." in made
    assert "A GPU, driver 1, torch 2.11, commit abc, 2026-01-02" in made
    written(tmp_path / "bench" / "results" / "h100" / "bench.json", record | {"dry": True})
    with pytest.raises(ValueError, match="quick check"):
        render.rendered(text)
    gpu = bench("tables_gpu")
    assert "| taa.update | cuda | 8 | 0 | 1 |  |" in gpu.gpu_tables([good_record(bench)])
    rows = [dict(model="Wan", blocks=3, arm="SLA", ms=30.0, ratio=2.5, extrapolated_full_ms=300.0)]
    blocks = good_record(bench) | {"kind": "gpu_blocks", "rows": rows}
    assert "| Wan, 3 blocks | SLA | 30.00 | 2.50× | 300.0 |" in gpu.gpu_tables([blocks])
