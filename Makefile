# make demo · make test · make bench: each sets up what it needs first (Python 3.10+, a C++ compiler; nvcc optional).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup build demo test bench lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja pybind11 torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

# One build at a time: several shells may share the tree.
build:
	flock build.lock $(BIN)/python setup.py -q build_ext --inplace

demo: setup
	$(BIN)/triskele demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --dist worksteal

# Records go to bench/results/, tables into README.md and docs/.
bench: setup
	$(BIN)/python bench/run.py
	$(BIN)/python bench/render.py

lint:
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info python/*.egg-info python/triskele/*.so $(VENV)/.ready
