# Everything runs in its own virtual environment; nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,dev,eval,readers,track

.PHONY: demo gate test lint lowest bench slow clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# Is what the demo wrote as good as the baselines that are committed?
gate: $(VENV)/installed
	$(BIN)/python -m pytest examples/ci

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m slow

# The tests with the oldest versions that pyproject.toml allows.
lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt EXTRAS=test

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/streaming.py

# torch comes first and pinned: a looser requirement would pull a CUDA build of several gigabytes.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
# GPTQModel asks for torchao and works without; transformers imports it wherever it is, and it prints errors on a CPU.
	$(BIN)/pip uninstall --quiet --yes torchao
	touch $@

clean:
	rm -rf .venv .venv-lowest out build dist
