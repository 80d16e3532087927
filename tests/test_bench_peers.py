"""Peers of the benchmarks: one that is broken costs its own column, and SDPA is timed on each of its backends."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CEILING = dict(copy_gb_s=10.0, float32_tflop_s=0.1, bfloat16_tflop_s=0.1, int8_tflop_s=0.1)
PACKAGES = ("sparse_linear_attention", "fla", "vmoba", "torchao", "gemlite")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


BROKEN = {
    "at its import": "raise ImportError('built for another torch')",
    "with an error of its own": "class Odd(Exception): pass\nraise Odd('no compiler')",
    "by its syntax": "def f(:",
    "in what it lacks": "",
    "at its set-up": """
class Setup:
    def __init__(self, *args, **kwargs): raise OSError("libcuda.so.1: cannot open")
SparseLinearAttention = Setup
""",
    "at its first call": """
import torch
class SparseLinearAttention(torch.nn.Linear):
    def __init__(self, dim, *args, **kwargs): super().__init__(dim, dim)
    def forward(self, q, k, v): raise NameError("triton is not defined")
def moba_attn_varlen(**kwargs): raise NameError("triton is not defined")
""",
}


@pytest.fixture
def broken(request, tmp_path, monkeypatch):
    """Every package of peers there, and broken in one way."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(BROKEN[request.param])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield request.param
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


def assert_ours_stands(row, *absent):
    assert "error" not in row, row
    assert row["timings"]["triskele"]["median_ms"] > 0 and row["ratios"]
    for name in absent:
        assert row["absent"][name].startswith(("cannot be set up: ", "fails here: ")), row["absent"]
        assert name not in row["ratios"]


@pytest.mark.parametrize("broken", BROKEN, indirect=True)
def test_a_broken_package_costs_its_own_column(bench, broken, monkeypatch):
    """As on a GPU, where they would all be tried."""
    run, gpu_cases, attention = bench("run"), bench("gpu_cases"), bench("peers_attention")
    monkeypatch.setattr(attention, "missing", lambda package, device: "")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    peers = (attention.SLA, attention.FLA)
    assert_ours_stands(run.measured(gpu_cases.sla_forward(1, 256, 16, 0.5), CPU, CEILING, 0.0), *peers)
    row = run.measured(bench("cases_attention").sla_forward(torch.float32, 1, 1, 256, 16, 0.5), CPU, CEILING, 0.0)
    assert_ours_stands(row, *peers)
    row = run.measured(gpu_cases.vmoba((2, 4, 6), (2, 3), 1, 16, top_k=2), CPU, CEILING, 0.0)
    assert_ours_stands(row, "vmoba")


@pytest.mark.parametrize("broken", ["at its import", "with an error of its own", "in what it lacks"], indirect=True)
def test_a_broken_torchao_costs_its_own_column(bench, broken):
    run, f32 = bench("run"), torch.float32
    for case in (bench("cases_linear").svdq_linear(f32, 3, 128, 64, rank=16),
                 bench("cases_linear").svdq_linear(f32, 3, 128, 64, rank=16, activated=True),
                 bench("gpu_cases").linear(3, 128, 64, 16)):
        row = run.measured(case, CPU, CEILING, 0.0)
        assert_ours_stands(row, "torchao")
        assert row["absent"]["gemlite"] == "needs a GPU"


def test_a_peer_that_fails_on_the_way_costs_its_own_column(bench):
    """At its second set of inputs, or in a later measurement of a case that was noisy."""
    run, case = bench("run"), bench("case")

    def failing(after):
        left = iter(range(after))

        def call():
            if next(left, None) is None:
                raise MemoryError("out of memory")
            return torch.ones(2)

        return call

    for after in (1, 3):
        peers = {"bad": failing(after), "good": lambda: torch.ones(2)}
        calls = case.Calls(lambda: torch.ones(2), peers, {}, 1.0, 1.0, "float32")
        row = run.measured(case.Case("c", "g", lambda _, calls=calls: calls, {"good": 1.0}), CPU, CEILING, 0.0)
        assert_ours_stands(row, "bad")
        assert list(row["ratios"]) == ["good"] and list(row["timings"]) == ["triskele", "good"]
    calls = case.Calls(failing(3), {}, {}, 1.0, 1.0, "float32")
    row = run.measured(case.Case("c", "g", lambda _: calls), CPU, CEILING, 0.0)  # ours may not
    assert row["error"] == "MemoryError: out of memory"


def test_a_checkouts_parameters_get_no_gradients(bench, monkeypatch, tmp_path):
    """They would keep a graph that no other peer keeps."""
    peers, case = bench("peers_attention"), bench("case")
    (tmp_path / "sparse_linear_attention.py").write_text("""
import torch
class SparseLinearAttention(torch.nn.Linear):
    def __init__(self, dim, keep, BLKQ, BLKK): super().__init__(dim, dim)
    def forward(self, q, k, v): return super().forward(v)
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "missing", lambda package, device: "" if package.startswith("sparse") else "no")
    calls, absent = peers.checkouts(case.drifting(CPU, torch.float32, 1, 1, 64, 16), 0.5)
    assert not calls[peers.SLA]().requires_grad and absent == {peers.FLA: "no"}
    del sys.modules["sparse_linear_attention"]


def test_a_missing_compiler_costs_its_own_column(bench, monkeypatch):
    def compile(function, **_):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

    monkeypatch.setattr(torch, "compile", compile)
    row = bench("run").measured(bench("cases_sampling").adaln_modulate(torch.float32, 2, 8, 32), CPU, CEILING, 0.0)
    assert_ours_stands(row, "torch.compile")
    case = bench("cases_attention").sla_forward(torch.float32, 1, 1, 256, 16, 0.5, flex=True)
    assert_ours_stands(bench("run").measured(case, CPU, CEILING, 0.0), bench("peers_attention").FLEX)


def test_dense_attention_is_timed_on_each_of_its_backends(bench, monkeypatch):
    """Forward and backward, by the backend that was asked for, with the same result."""
    peers, case = bench("peers_attention"), bench("case")
    inputs = case.drifting(CPU, torch.float32, 1, 2, 128, 16, sets=1)
    chosen = []
    real = peers.sdpa

    def watched(q, k, v):
        chosen.append(torch._fused_sdp_choice(q, k, v))
        return real(q, k, v)

    monkeypatch.setattr(peers, "sdpa", watched)
    choices = {"sdpa": 1, "sdpa flash": 1, "sdpa math": 0}  # of torch's SDPBackend
    for calls, absent in (peers.forward(inputs), peers.backward(inputs)):
        assert set(calls) == set(choices) and set(absent) == {"sdpa cudnn", "sdpa efficient"}
    for name, call in peers.forward(inputs)[0].items():
        chosen.clear()
        torch.testing.assert_close(call(), real(*inputs[0]))
        assert chosen == [choices[name]]
    chosen.clear()
    peers.backward(inputs)  # its graphs are of the forward passes made here
    assert chosen == list(choices.values())
    assert set(peers.forward(inputs, backends=False)[0]) == {"sdpa"}
    monkeypatch.setattr(peers, "SCORES", 4 * 2 * 128 * 128 - 1)
    assert peers.forward(inputs)[1]["sdpa math"] == "its scores do not fit"


def test_a_backward_target_is_against_the_best_dense(bench):
    cases = {case.name: case for case in bench("gpu_cases").short()}
    (name,) = (name for name in cases if name.startswith("sla_backward"))
    assert cases[name].targets == {"the best sdpa": 8.0}
    row = bench("run").measured(bench("gpu_cases").sla_backward(1, 256, 16, 0.5, target=1.0), CPU, CEILING, 0.0)
    dense = [ratio for name, ratio in row["ratios"].items() if name.startswith("sdpa")]
    assert len(dense) == 3 and row["ratios"]["the best sdpa"] == min(dense)
