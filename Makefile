# Everything runs in its own virtual environment; nothing outside this folder is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo gate test lint bench slow clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# Is what the demo wrote as good as the baselines that are committed?
gate: $(VENV)/installed
	$(BIN)/python -m pytest examples/ci

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/streaming.py

# torch comes first and pinned: a looser requirement would pull a CUDA build of several gigabytes.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev,eval,readers,track]'
# GPTQModel asks for torchao and works without; transformers imports it wherever it is, and it prints errors on a CPU.
	$(BIN)/pip uninstall --quiet --yes torchao
	touch $@

clean:
	rm -rf $(VENV) out build dist
