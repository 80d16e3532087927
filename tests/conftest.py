"""Fixtures shared by all tests: vectors of the published code, hostile inputs, one thread setting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

VECTORS = Path(__file__).parent / "vectors"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


class Vectors(dict):
    """The tensors of one file, and its metadata."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            super().__init__({name: file.get_tensor(name) for name in file.keys()})
            self.metadata = file.metadata() or {}
        self.name = path.stem


def vector_files(folder: str, pattern: str = "*") -> list[Path]:
    """The files of tests/vectors/<folder>; an empty match is an error, not an empty test."""
    files = sorted((VECTORS / folder).glob(pattern + ".safetensors"))
    assert files, f"no vectors match {folder}/{pattern}"
    return files


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
