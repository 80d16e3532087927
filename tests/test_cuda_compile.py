"""Every CUDA kernel as compiled for its chips: no spills, no local memory, the matrix instruction meant."""

from __future__ import annotations

import cuda_offline
import pytest

pytestmark = pytest.mark.skipif(bool(cuda_offline.why_not()), reason="; ".join(cuda_offline.why_not()))


@pytest.mark.parametrize("stem", cuda_offline.stems())
def test_kernels_as_compiled(stem):
    kernels = cuda_offline.kernels(stem)
    assert {kernel.chip for kernel in kernels} == set(cuda_offline.CHIPS[stem.rsplit("_", 1)[-1]])
    assert not (problems := [text for kernel in kernels for text in kernel.problems()]), "\n".join(problems)
    for source, name in cuda_offline.EXPECTED:
        assert source != stem or name in {kernel.short for kernel in kernels}


def test_a_matrix_instruction_is_expected_only_of_sources_that_exist():
    assert {source for source, _ in cuda_offline.EXPECTED} <= set(cuda_offline.stems())


def test_the_page_lists_every_source():
    page = (cuda_offline.ROOT / "docs" / "gpu_kernels.md").read_text()
    assert {row.split(" ")[1] for row in page.splitlines() if "| sm_" in row} == set(cuda_offline.stems())


def test_rules_are_told_apart():
    good = cuda_offline.Kernel("svdq_w4a8_sm90", "w4a8_kernel<128>", 90, 168, 0, 1024, {"IGMMA": 8}, 0, looped=8)
    assert good.problems() == []
    values = {**good.__dict__}
    assert "8 bytes of stack" in cuda_offline.Kernel(**{**values, "stack": 8}).problems()[0]
    assert "2 loads and stores" in cuda_offline.Kernel(**{**values, "local": 2}).problems()[0]
    assert "expected IGMMA" in cuda_offline.Kernel(**{**values, "matrix": {"IMMA": 8}}).problems()[0]
    assert "0 of them in loops" in cuda_offline.Kernel(**{**values, "looped": 0}).problems()[0]
    assert "serialised" in cuda_offline.Kernel(**{**values, "groups": 8}).problems()[0]
    assert "static shared" in cuda_offline.Kernel(**{**values, "shared": 50 << 10}).problems()[0]


@pytest.mark.parametrize("registers, shared, threads, blocks", [
    (168, 200 << 10, 384, 1), (32, 0, 128, 16), (64, 0, 128, 8), (128, 40 << 10, 128, 4), (40, 100 << 10, 256, 2)])
def test_occupancy(registers, shared, threads, blocks):
    assert cuda_offline.occupancy(registers, shared, threads) == blocks
