# make demo: the whole loop on the toy world.  make test: the tests.  Both create .venv and install on first use.
PYTHON ?= python3
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
# What pip installs as PyTorch; another build, for example: make TORCH="torch --index-url URL"
TORCH ?= $(if $(GPU),'torch>=2.11','torch==2.13.0')
NPROC ?= 1
ARGS ?=

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow bench lint clean

demo: .venv/.stamp
	$(BIN)/torchrun --nproc-per-node $(NPROC) cai_fast/train.py $(ARGS)

# One thread per test process: two of them share the cores.
test: .venv/.stamp
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile $(ARGS)

test-slow: .venv/.stamp
	$(PYTEST) -m slow $(ARGS)

bench: .venv/.stamp
	$(BIN)/python -m $(if $(GPU),bench.gpu_suite,bench.ops) $(ARGS)

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info

.venv/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
