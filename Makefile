# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-long lint bench clean

setup: $(STAMP)

# uv takes the registry's own torch build, whose torchvision operators work without a GPU too. It compiles no bytecode unless
# told to; where Python is told to write none, as in many containers, each process would compile what it imports: seconds of
# every test and of every worker's start.
unexport PYTHONDONTWRITEBYTECODE
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q modmill.py engine labelers manifests tokenize_jobs train
	touch $(STAMP)

demo: setup
	$(BIN)/python -m examples.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# In two processes, which share the files out between them; `pytest` alone runs in one.
test: lint
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m "not long" --durations=25 --durations-min=4

# What takes too long for every change: fuzzing by the thousand, kills by the dozen.
test-long: setup
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m long

bench: setup
	for name in engine manifest loader generation; do $(BIN)/python -m benchmarks.$$name --quick || exit 1; done

clean:
	rm -rf $(VENV) demo-out .pytest_cache .ruff_cache .import_linter_cache
