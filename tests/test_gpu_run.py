"""The GPU run rehearsed on a CPU: its stages and their records, and that its tests can fail."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu.family import by_entry, exact_arguments, run
from gpu.test_kernels import OPS

from triskele import backend as backend_module
from triskele.backend import TABLES

ROOT = Path(__file__).parent.parent
RECORDS = ("run", "tests", "sanitizer", "bench", "blocks", "ncu")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


# ------------------------------------------------------------------------------------------------ the rehearsal

@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(exit status and output, the records) of every stage on this CPU."""
    out = tmp_path_factory.mktemp("gpu")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRISKELE"))}
    done = subprocess.run([ROOT / "bench" / "gpu.sh", "--dry", "--out", out], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=environment | {"PYTHON": sys.executable})
    return done, {path.stem: json.loads(path.read_text()) for path in (out / "dry").glob("*.json")}


def test_every_stage_of_a_rehearsal_passes_and_leaves_its_record(rehearsal):
    done, records = rehearsal
    assert done.returncode == 0, done.stdout[-4000:]
    assert set(records) == set(RECORDS)
    assert all(record.get("dry") is True for record in records.values())
    stages = records["run"]["stages"]
    assert list(stages) == ["build", "tests", "sanitizer", "bench", "blocks", "ncu", "report"]
    assert {stage["result"] for stage in stages.values()} <= {"passed", "nothing to do"}
    assert "cpu" in records["run"]["build"]["before"] and not records["run"]["build"]["built"]
    last = done.stdout.rsplit("===== report", 1)[1]
    assert "--- tests" in last and "sla.forward/cpu" in last and "taa_step" in last


def test_the_record_of_the_tests_counts_every_op(rehearsal):
    record = rehearsal[1]["tests"]
    wanted = {f"{op}/cpu" for op, table in TABLES.items() if any(entry.name == "cpu" for entry in table)
              and not op.startswith("test.")}
    assert set(record["results"]) == wanted and record["architecture"] is None and record["whole_suite"]
    for name, entry in record["results"].items():
        assert not entry["failed"] and entry["passed"] > 5 and entry["complete"], name
        assert {"accuracy", "bits", "layout"} <= set(entry["checks"]), name
        assert entry["collected"] >= entry["passed"] + len(entry["refused"])
    refused = rehearsal[1]["tests"]["results"]["sla.forward/cpu"]["refused"]
    assert refused and all("refused: takes float32 and bfloat16" in reason for reason in refused.values())


def test_the_benchmarks_say_which_backend_ran_and_name_absent_peers(rehearsal):
    record = rehearsal[1]["bench"]
    assert record["ceilings"]["copy_gb_s"] > 0 and record["machine"]["commit"]
    groups = {row["group"] for row in record["cases"]}
    assert groups == {"sla_forward", "sla_backward", "sla_route", "vmoba", "svdq_linear", "taa_step", "adaln"}
    for row in record["cases"]:
        assert "error" not in row and row["timings"]["triskele"]["median_ms"] > 0, row
        assert row["backends"] and set(row["backends"].values()) == {"cpu"}, row["name"]
        assert all(row["absent"].values())
    assert "thu-ml/SLA" in record["cases"][0]["absent"]


def test_the_blocks_run_plain_and_under_each_arm(rehearsal):
    if rehearsal[1]["run"]["stages"]["blocks"]["result"] == "nothing to do":
        pytest.skip("diffusers is not installed")
    rows = rehearsal[1]["blocks"]["rows"]
    assert {row["model"] for row in rows} == {"Wan", "FLUX", "DiT"} and not any("error" in row for row in rows)
    arms = [row for row in rows if row["arm"] != "plain"]
    assert all(row["ms"] > 0 and row["backends"] for row in arms)
    assert all(0 < row["distance_to_plain"] < 1.5 for row in arms if row["model"] != "DiT")
    assert next(row for row in arms if row["model"] == "DiT")["rounds"] >= 1


def test_the_rehearsal_verifies_nothing(bench, rehearsal, tmp_path):
    (tmp_path / "tests.json").write_text(json.dumps(rehearsal[1]["tests"]))
    found, refusals = bench("verify").verified([tmp_path / "tests.json"])
    assert not found and "is a dry run" in refusals[0]


# ------------------------------------------------------------------------------------------------ stages

def test_stages_are_chosen_and_boxed(bench, tmp_path, monkeypatch, capsys):
    """A stage that fails or runs out of time does not stop the rest; a tool that is absent is no failure."""
    gpu_run = bench("gpu_run")
    ran = []
    status = {"build": 0, "tests": 1, "sanitizer": 77, "bench": 124, "blocks": 0, "ncu": 0, "report": 0}
    known = gpu_run.stages(True)

    def fake(command, seconds, env, log):
        marks = [name for name in known if f"{name}.json" in " ".join(command)]
        name = marks[0] if marks else "tests" if "pytest" in command else "report"
        ran.append((name, seconds))
        if name == "bench":
            (tmp_path / "dry" / "bench.partial").write_text('{"cases": [1]}')
        return status[name]

    monkeypatch.setattr(gpu_run, "run", fake)
    assert gpu_run.main(["--dry", "--out", str(tmp_path)]) == 1
    assert [name for name, _ in ran] == list(known)
    assert all(5 <= seconds / gpu_run.PATIENCE <= known[name].seconds for name, seconds in ran)
    record = json.loads((tmp_path / "dry" / "run.json").read_text())
    assert [stage["result"] for stage in record["stages"].values()] == [
        "passed", "failed", "nothing to do", "out of time", "passed", "passed", "passed"]
    assert json.loads((tmp_path / "dry" / "bench.json").read_text()) == {"cases": [1], "cut_off": True}
    ran.clear()
    (tmp_path / "dry" / "ncu.json").write_text("an old one")
    assert gpu_run.main(["--dry", "--out", str(tmp_path), "ncu", "sanitizer"]) == 0
    assert [name for name, _ in ran] == ["sanitizer", "ncu"] and not (tmp_path / "dry" / "ncu.json").exists()
    with pytest.raises(SystemExit):
        gpu_run.main(["--dry", "nothing"])
    assert "expected some of build, tests" in capsys.readouterr().err
    assert gpu_run.main(["--list"]) == 0 and "compute-sanitizer" in capsys.readouterr().out


def test_the_boxes_of_all_stages_fit_into_nine_minutes(bench):
    gpu_run = bench("gpu_run")
    known = gpu_run.stages(False)
    left, spent = 530.0, 0.0
    for name in known:
        seconds = gpu_run.box(name, list(known), left - spent, known)
        assert seconds >= 0.33 * known[name].seconds
        spent += seconds  # every one takes all that it gets
    assert spent <= 540


def ends(process: int) -> bool:
    """Whether a process that was killed is gone within seconds: the kernel takes its time, init to reap it too."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_stage_is_stopped_with_what_it_started(bench):
    gpu_run = bench("gpu_run")
    log = io.StringIO()
    code = ("import subprocess, sys, time; print('began', flush=True)\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            "print(child.pid, flush=True); time.sleep(600)")
    assert gpu_run.run(("-c", code), 3.0, dict(os.environ), log) == 124
    began, child = log.getvalue().split()
    assert began == "began"
    assert ends(int(child))
    assert gpu_run.run(("-c", "raise SystemExit(3)"), 60.0, dict(os.environ), log) == 3


class Stuck(subprocess.Popen):
    """In the driver: it was killed, and is not gone. (This one is; only the waiting is played.)"""

    def wait(self, timeout=None):
        assert timeout is not None and timeout <= 10, "waits without a limit"
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_a_process_that_outlives_its_kill_does_not_hold_the_run(bench, tmp_path, monkeypatch, capsys):
    gpu_run, environment = bench("gpu_run"), bench("gpu_environment")
    monkeypatch.setattr(subprocess, "Popen", Stuck)
    sleep = ("-c", "import time; time.sleep(600)")
    start = time.monotonic()
    assert gpu_run.run(sleep, 0.2, dict(os.environ), io.StringIO()) == environment.OUT_OF_TIME
    assert environment.run_all({"one": [sys.executable, *sleep]}, 0.2)["one"].status == environment.OUT_OF_TIME
    assert bench("gpu_supervise")._once(list(sleep), tmp_path / "partial", 0.2, 9.0) == environment.OUT_OF_TIME
    assert time.monotonic() - start < 60
    assert capsys.readouterr().out.count("does not end although it was killed") == 3


ENDED = """
import os, sys
import gpu_run
gpu_run.stages = lambda dry: {"bench": gpu_run.Stage(600, (sys.argv[2], "{out}"), "sleeps")}
gpu_run.environment = lambda *_: dict(os.environ)
sys.exit(gpu_run.main(["--dry", "--out", sys.argv[1]]))
"""
SLEEPS = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], "bench.partial").write_text('{"cases": [1]}')
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_run_that_is_ended_takes_its_stage_along_and_keeps_what_there_is(bench, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])}
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    running = subprocess.Popen([sys.executable, "-c", ENDED, str(tmp_path), str(tmp_path / "sleeps.py")], text=True,
                               env=environment, stdout=subprocess.PIPE)
    for line in running.stdout:
        if line.strip().isdigit():
            break
    running.terminate()
    assert running.wait(timeout=60) == bench("gpu_run").ENDED
    running.stdout.close()
    assert ends(int(line))
    record = json.loads((tmp_path / "dry" / "run.json").read_text())
    assert record["stages"]["bench"]["result"] == "ended from outside"
    assert json.loads((tmp_path / "dry" / "bench.json").read_text()) == {"cases": [1], "cut_off": True}


def test_the_nine_minutes_are_bounded_from_outside(tmp_path):
    """Whatever gpu_run.py does: here it does nothing, and does not want to end."""
    deaf = tmp_path / "python"
    deaf.write_text("#!/usr/bin/env bash\ntrap '' TERM\nwhile true; do sleep 0.1; done\n")
    deaf.chmod(0o755)
    start = time.monotonic()
    done = subprocess.run([ROOT / "bench" / "gpu.sh"], timeout=120,
                          env=os.environ | {"PYTHON": str(deaf), "LIMIT": "2"})
    assert done.returncode in (137, -9) and time.monotonic() - start > 2
    text = (ROOT / "bench" / "gpu.sh").read_text()
    assert "limit=540\n" in text and "timeout --foreground -k 5" in text


SCRIPT = """
import json, os, sys, time
from pathlib import Path
from gpu_supervise import LOST, LOST_ERROR, Progress
out = Path(sys.argv[1])
progress = Progress(out.with_suffix(".partial"), lambda: {"cases": []}, "--resume" in sys.argv)
done = progress.record["cases"]
if progress.interrupted:
    done.append([progress.interrupted, LOST_ERROR])
for name in ("good", "hangs", "breaks", "killed", "last"):
    if name in [row[0] for row in done]:
        continue
    progress.begin(name)
    if name == "hangs":
        time.sleep(600)
    if name == "killed":
        os.kill(os.getpid(), 9)
    done.append([name, "failed" if name == "breaks" else ""])
    progress.done()
    if name == "breaks":
        raise SystemExit(LOST)
progress.finish(out)
"""


def test_a_hang_or_a_lost_context_costs_one_case(bench, tmp_path, monkeypatch, capfd):
    supervise = bench("gpu_supervise")
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]))
    out = tmp_path / "bench.json"
    arguments = ["--partial", str(out.with_suffix(".partial")), "--silence", "5", "--seconds"]
    assert supervise.main([*arguments, "300", str(tmp_path / "script.py"), str(out)]) == 1
    assert json.loads(out.read_text()) == {"cases": [
        ["good", ""], ["hangs", supervise.LOST_ERROR], ["breaks", "failed"], ["killed", supervise.LOST_ERROR],
        ["last", ""]]}
    assert capfd.readouterr().out.count("its process was lost") == 3
    (tmp_path / "slow.py").write_text("import time; time.sleep(600)")
    assert supervise.main([*arguments, "1", str(tmp_path / "slow.py")]) == bench("gpu_environment").OUT_OF_TIME
    (tmp_path / "quick.py").write_text("raise SystemExit(77)")
    assert supervise.main([*arguments, "60", str(tmp_path / "quick.py")]) == 77


def test_tools_run_side_by_side_and_take_what_they_watch_along(bench):
    environment = bench("gpu_environment")
    watched = ("import subprocess, sys, time\n"
               "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
               "print(child.pid, flush=True); time.sleep(600)")
    ended = environment.run_all({"quick": [sys.executable, "-c", "print('done'); raise SystemExit(9)"],
                                 "slow": [sys.executable, "-c", watched]}, 3.0)
    assert (ended["quick"].status, ended["quick"].output) == (9, "done\n") and ended["quick"].seconds < 3
    assert ended["slow"].status == environment.OUT_OF_TIME
    assert ends(int(ended["slow"].output))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_pretends_to_run(bench, capsys):
    with pytest.raises(SystemExit):
        bench("gpu_run").main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_package_is_whole_without_being_installed_and_without_its_module(bench, tmp_path):
    """As on a machine with another Python: links to the tree, no `_C` that this interpreter could import."""
    environment = bench("gpu_environment")
    folder = environment.overlay(environment.overlay(tmp_path))  # a second time changes nothing
    for path in (folder / "triskele").glob("_C.*"):
        path.unlink()
    code = ("import sys, torch\n"
            "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]  # not installed\n"
            "import triskele, triskele.triton_kernels, triskele.assets\n"
            "from triskele.doctor import doctor\n"
            "assert triskele.__file__.startswith(%r), triskele.__file__\n"
            "print(doctor())\n"
            "q = torch.randn(1, 1, 64, 8)\n"
            "print(triskele.ops.route_blocks(q, q, keep=0.5, block_k=8, backend='cpu').sum())")
    done = subprocess.run([sys.executable, "-c", code % str(folder)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    assert "triskele._C is not in the package" in done.stdout and "CPU library   loads" in done.stdout
    assert "tensor(4)" in done.stdout


def test_names_of_devices_become_folders(bench, monkeypatch):
    environment = bench("gpu_environment")
    assert environment.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setenv("TRISKELE_COMMIT", "abc")
    assert environment.commit_of({"commit": "unknown"}) == "abc" and environment.commit_of({"commit": "d+"}) == "d+"


# ------------------------------------------------------------------------------------------------ the suite itself

BREAKER = """
import gpu_supervise

gpu_supervise.context_is_lost = lambda device: True


def pytest_runtest_setup(item):
    if "test_bits" in item.nodeid and "2x511" in item.nodeid and ", relative" in item.nodeid:
        raise RuntimeError("an illegal memory access was encountered")
"""


def test_a_lost_context_fails_one_test_and_not_those_behind_it(bench, tmp_path):
    (tmp_path / "breaker.py").write_text(BREAKER)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "PYTHONPATH": path, "TRISKELE_GPU_DRY": "1", "TRISKELE_GPU_RECORD": str(tmp_path / "tests.json")}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "-p", "breaker", "-n", "1", "-k",
               "test_bits and taa.gamma"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    record = json.loads((tmp_path / "tests.json").read_text())
    entry = record["results"]["taa.gamma/cpu"]
    assert done.returncode == 1, done.stdout
    assert len(entry["failed"]) == 1 and entry["passed"] == entry["collected"] - 1 >= 3, done.stdout
    assert not entry["complete"] and not record["whole_suite"]  # -k leaves tests out


def test_a_cut_off_leaves_whole_families():
    """The tests of an op and backend stand side by side, CUDA's before Triton's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "TRISKELE_GPU_DRY": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "--collect-only"],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    order = [line.split("[", 1)[1].split(":", 1)[0] for line in done.stdout.splitlines() if "[" in line]
    assert len(order) > 100 and len(set(order)) >= 10, done.stdout[-2000:]
    changes = sum(left != right for left, right in itertools.pairwise(order))
    assert changes == len(set(order)) - 1, "a family's tests lie apart"

    def item(op, backend):
        return SimpleNamespace(callspec=SimpleNamespace(params={"op": OPS[op], "backend": backend}))

    mixed = [item("taa.gamma", "triton"), item("sla.forward", "triton"), item("taa.gamma", "cuda"), SimpleNamespace(),
             item("sla.forward", "cuda"), item("taa.gamma", "triton")]
    place = {id(entry): i for i, entry in enumerate(mixed)}
    assert [place[id(entry)] for entry in by_entry(mixed)] == [3, 2, 4, 0, 5, 1]


def test_every_op_of_the_tables_has_cases():
    assert set(OPS) == {name for name in TABLES if not name.startswith("test.")}
    for op in OPS.values():
        names = [case.name for case in op.cases]
        assert len(names) == len(set(names)), op.name
        assert any(case.thorough and not case.medium for case in op.cases), op.name


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_gpu_backend_takes_cases_of_each_kind(name, monkeypatch):
    """What a backend refuses it says by shapes and dtypes, on any machine: enough must be left for it to be tested."""
    op, caught = OPS[name], []
    explain = backend_module.explain

    def watching(table, *inputs, **kwargs):
        caught.append(inputs)
        return explain(table, *inputs, **kwargs)

    monkeypatch.setattr(backend_module, "explain", watching)
    taken: dict[str, list] = {entry.name: [] for entry in TABLES[name] if entry.device_type == "cuda"}
    for case in op.cases if taken else ():
        if case.medium:
            continue
        run(op, case.make(0), "reference")
        for entry in TABLES[name]:
            if entry.name in taken and not entry.why_not(*caught[-1]):
                taken[entry.name].append(case)
    for backend, cases in taken.items():
        assert len(cases) >= 4, f"{name}/{backend} takes {len(cases)} small cases"
        assert any(case.thorough for case in cases), f"{name}/{backend}: bits, graphs, streams and layouts not tested"


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_wrong_result_is_past_the_budget(name):
    """The reference's own result passes; one element moved by a tenth of the largest does not."""
    op = OPS[name]
    case = next(case for case in op.cases if case.thorough)
    arguments = case.make(0)
    exact = run(op, exact_arguments(arguments), "reference")
    plain = run(op, arguments, "reference")
    op.compare(arguments, plain, exact)
    for position, good in enumerate(plain):
        if not good.numel():
            continue
        wrong = good.clone()
        flat = wrong.view(-1)
        if good.is_floating_point():
            at = int(good.flatten().double().nan_to_num(0, 0, 0).abs().argmax())
            flat[at] += 0.1 * flat[at].abs() + 1e-3
        elif good.dtype == torch.bool:
            flat.logical_not_()
        else:
            flat[0] = 1 - flat[0]
        with pytest.raises(AssertionError):
            op.compare(arguments, (*plain[:position], wrong, *plain[position + 1:]), exact)
