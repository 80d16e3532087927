# make demo · make test · make bench: each sets up what it needs first (Python 3.10+, a C++ compiler; nvcc optional).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup build demo test test-levels test-arm sanitize fuzz bench gpu gpu-carry gpu-dry gpu-records lint clean

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

# The kernels' tests on each instruction-set level of this CPU; under AddressSanitizer and UBSan, on the plain level and
# the best one; and 10^4 random calls against the float64 references. `make test` runs parts of the first two.
test-levels: setup
	$(BIN)/python tests/kernels.py all-levels -n auto

# The kernels' tests on the Arm levels, emulated: about three quarters of an hour. Wants qemu-user and g++-aarch64-linux-gnu, no root.
test-arm: setup
	$(BIN)/python tests/arm.py -n auto

sanitize: setup
	$(BIN)/python tests/sanitize.py

fuzz: setup
	$(BIN)/python tests/fuzz.py --cases 10000 --seed 0 --minutes 8

# About 15 minutes. Records go to bench/results/, tables and plots into README.md and docs/. A case that fails does not
# stop the rest, only the exit status tells.
bench: setup
	status=0; $(BIN)/python bench/run.py --cases curves || status=1; \
	$(BIN)/python bench/end_to_end.py || status=1; $(BIN)/python bench/render.py || status=1; exit $$status

# On a machine with a GPU, as it is: nothing is installed. At most nine minutes; docs/gpu_run.md.
gpu:
	bench/gpu.sh

# The libraries for a machine that builds nothing, a seventh of their size: build/carry/native.tar.xz.
gpu-carry: build
	mkdir -p build/carry
	tar -cJf build/carry/native.tar.xz -C python/triskele libtriskele_cpu.so libtriskele_cuda.so built_from.json

# The same stages on this CPU, small; and what follows from the records of a run: verified.json and the tables.
gpu-dry: setup
	bench/gpu.sh --dry

gpu-records: setup
	$(BIN)/python bench/verify.py
	$(BIN)/python bench/render.py

lint:
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info python/*.egg-info python/triskele/*.so python/triskele/built_from.json $(VENV)/.ready
