# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What the demo needs and no more: a fresh machine is ready for it in half the time.
RUNNABLE := $(VENV)/.runnable

.PHONY: demo test lint types format docs clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(RUNNABLE)

$(RUNNABLE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[onnx]'
	touch $@

# The whole pipeline on the small shipped model: prune, evaluate, export, run in DeepSparse, report.
demo: $(RUNNABLE)
	$(BIN)/sparsedeploy demo --output demo-output

# One thread per test process: the processes share the cores, and results do not depend on the thread count.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ that come from the code.
docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) demo-output .mypy_cache .ruff_cache .pytest_cache
