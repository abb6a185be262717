# Every target makes .venv and installs what it needs first; nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2 # test files at a time, one thread each

.PHONY: quickstart test test-slow test-slurm check format bench clean

quickstart: $(VENV)/.installed
	$(BIN)/beit-train chain=quickstart

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slurm and not slow"

test-slow: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "slow and not gpu and not slurm"

# Starts a Slurm of two nodes on this machine, and ends it: needs root, and Debian's packages of Slurm.
test-slurm: $(VENV)/.installed-test
	$(BIN)/pytest -m slurm

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/shuffle.py
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/token_cache.py
	$(BIN)/python benchmarks/shard_index.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed
