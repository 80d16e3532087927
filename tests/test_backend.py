"""The one place that chooses a backend: order, reasons, the verified rule, and that nothing falls back silently."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triskele as tk
from triskele import backend as backend_module
from triskele.backend import Backend, explain, register, select


@pytest.fixture
def table():
    def make(*entries):
        return register("test.op", tuple(entries))

    yield make
    backend_module.TABLES.pop("test.op", None)


def test_first_backend_without_a_reason_wins(table):
    table(Backend("cpu", lambda x: "cpu"), Backend("reference", lambda x: "reference"))
    assert select("test.op", torch.zeros(1)).name == "cpu"
    assert select("test.op", torch.zeros(1), backend="reference").run(None) == "reference"


def test_auto_does_not_pick_reference_where_the_device_has_a_kernel(table):
    table(Backend("cpu", lambda x: 0, lambda x: ["takes float32"]), Backend("reference", lambda x: 0))
    with pytest.raises(NotImplementedError) as error:
        select("test.op", torch.zeros(1))
    message = str(error.value)
    assert "cpu: takes float32" in message and "reference: auto does not pick it" in message


def test_auto_picks_reference_where_there_is_no_kernel_yet(table):
    table(Backend("cuda", lambda x: 0), Backend("reference", lambda x: 0))
    choice = explain("test.op", torch.zeros(1))
    assert choice.chosen == "reference"
    assert choice.reasons["cuda"] == ["takes cuda tensors, got cpu"]


def test_every_reason_is_listed(table):
    table(Backend("cpu", lambda x: 0, lambda x: ["first", "second"]), Backend("reference", lambda x: 0))
    with pytest.raises(NotImplementedError, match=r"(?s)cpu: first.*cpu: second"):
        select("test.op", torch.zeros(1), backend="cpu")


def test_missing_library_is_a_reason(table):
    table(Backend("cpu", lambda x: 0, missing=lambda: ["lib.so is missing"]), Backend("reference", lambda x: 0))
    with pytest.raises(NotImplementedError, match=r"lib\.so is missing"):
        select("test.op", torch.zeros(1))


def test_an_unverified_gpu_kernel_runs_by_name_only_and_auto_says_so(table, monkeypatch):
    class Fake(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    monkeypatch.setattr(backend_module, "architecture", lambda device: "sm90")
    x = torch.zeros(1).as_subclass(Fake)
    table(Backend("cuda", lambda x: "ran"), Backend("reference", lambda x: 0))
    choice = explain("test.op", x)
    assert choice.chosen == "reference" and "not verified on sm90" in choice.reasons["cuda"][0]
    assert select("test.op", x, backend="cuda").name == "cuda"
    table(Backend("cuda", lambda x: "ran", verified=("sm90",)), Backend("reference", lambda x: 0))
    assert select("test.op", x).name == "cuda"


@pytest.mark.parametrize("wrong", ["gpu", "CPU", ""])
def test_unknown_backend_name(table, wrong):
    table(Backend("reference", lambda x: 0))
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        select("test.op", torch.zeros(1), backend=wrong)


def test_tables_hold_the_order(table):
    with pytest.raises(ValueError, match="expected backends in the order"):
        table(Backend("reference", lambda x: 0), Backend("cpu", lambda x: 0))
    with pytest.raises(ValueError, match="backend name"):
        Backend("opencl", lambda x: 0)


def test_backends_lists_every_family():
    rows = tk.backends()
    families = {row.op.split(".")[0] for row in rows}
    assert {"sla", "vmoba", "svdq", "taa"} <= families
    for op in {row.op for row in rows}:
        assert any(row.op == op and row.backend == "reference" and row.runs_here for row in rows), op
    for row in rows:
        assert row.runs_here == (not row.why_not)
        if row.backend in ("cuda", "triton") and not torch.cuda.is_available():
            assert any("CUDA" in reason for reason in row.why_not)
    assert "why not" in str(rows)


def test_import_needs_no_diffusers_and_no_library():
    """`import triskele` and its ops in a process where diffusers cannot be imported."""
    code = ("import sys; sys.modules['diffusers'] = None; sys.modules['triton'] = None\n"
            "import triskele as tk, torch\n"
            "tk.ops, tk.nn, tk.quantize, tk.sampling, tk.SLA(), tk.backends()\n"
            "q = torch.randn(1, 1, 8, 4)\n"
            "print(tk.ops.route_blocks(q, q, keep=0.5, block_q=2, block_k=2).shape)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 1, 4, 4])" in done.stdout


def test_missing_library_names_the_remedy(tmp_path, monkeypatch):
    from triskele import _native

    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    _native.cpu_library.cache_clear()
    try:
        reasons = _native.cpu_library()
        assert reasons and "libtriskele_cpu.so is missing" in reasons[0] and "pip install" in reasons[0]
        (tmp_path / "libtriskele_cpu.so").write_bytes(b"not a library")
        _native.cpu_library.cache_clear()
        assert "does not load" in _native.cpu_library()[0]
    finally:
        _native.cpu_library.cache_clear()


@pytest.mark.parametrize("level", ["base", "avx2", "avx512", "avx512_bf16", "dotprod"])
def test_a_lower_instruction_set_can_be_forced(level):
    code = "from triskele import _native; print(_native.cpu_level(), _native.cpu_library())"

    def run(script, **environment):
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent,
                              env={"PATH": "/usr/bin", **environment})

    levels = run("import kernels; print(*kernels.levels())").stdout.split()  # this process may be forced itself
    assert levels[0] == "base"
    done = run(code, TRISKELE_CPU_LEVEL=level)
    if level not in levels:
        assert "TRISKELE_CPU_LEVEL" in done.stdout
    else:
        assert done.stdout.split()[0] == level


def test_an_unknown_level_is_refused():
    code = "from triskele import _native; print(_native.cpu_library())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={"PATH": "/usr/bin", "TRISKELE_CPU_LEVEL": "avx1024"})
    assert "TRISKELE_CPU_LEVEL: expected" in done.stdout, done.stdout + done.stderr
