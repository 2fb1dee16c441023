# make demo       set up, then train and run a small early-exit model on two CPU cores (some minutes, no GPU, no data needed)
# make demo-tune  add exits to a real model (SmolLM2-135M), tune them, compare before and after (some minutes, no GPU)
# make test-fast  set up, then run what takes no more than minutes: unit tests, and every program once
# make test       set up, then run all tests; like the fast ones, two files at a time (TEST_PROCESSES=2)
# make coverage   set up, then say which lines the fast tests run (COVERAGE_TESTS=tests for all); see below
# make lint       formatting, imports, spelling, types
# make hooks      set up, then have git run the checks of `make lint` before every commit (.pre-commit-config.yaml)
# make docs       set up, then write pages of all modules from their docstrings (build/docs/index.html)
# make bench      benchmarks (quick form); full ones: benchmarks/README.md
#
# Another Python, in an environment of its own: make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TEST_PROCESSES ?= 2
COVERAGE_TESTS ?= tests/smoke tests/unit
COVERAGE_FOLDER ?= runs/coverage
DOCS_FOLDER ?= build/docs
DEMO_FOLDER ?= runs/demo
DEMO_TUNE_FOLDER ?= runs/demo-tune
BIN = $(VENV)/bin

# Images of containers set it. The tests start hundreds of programs, each of which would compile the package for itself.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo demo-tune test test-fast coverage lint hooks docs bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh $(DEMO_FOLDER)

demo-tune: setup
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo_tune.sh $(DEMO_TUNE_FOLDER)

# The tests of a file share what they build. In the order of their names, many small files come last.
SHARED_OUT = --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-fast: setup
	$(BIN)/python -m pytest tests/smoke tests/unit -m "not slow" $(SHARED_OUT) --durations 5

test: setup
	$(BIN)/python -m pytest tests $(SHARED_OUT) --durations 20

# Of the processes of pytest alone: what programs, ranks, engines and servers run that a test starts is not counted, so
# the truth is higher, above all in training/, inference/worker/ and server/. The report ends with the files least run.
coverage: export COVERAGE_FILE = $(abspath $(COVERAGE_FOLDER))/data
coverage: setup
	mkdir -p $(COVERAGE_FOLDER)
	$(BIN)/python -m pytest $(COVERAGE_TESTS) -m "not slow" $(SHARED_OUT) --cov --cov-report=
	$(BIN)/python -m coverage html --quiet --directory $(COVERAGE_FOLDER)/html
	$(BIN)/python -m coverage report --skip-covered --sort=-cover | tail -n 25
	@echo "all files, line by line: $(COVERAGE_FOLDER)/html/index.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

hooks: setup
	$(BIN)/python -m pre_commit install

docs: setup
	$(BIN)/python tools/make_api_docs.py --output $(DOCS_FOLDER)

bench: setup
	$(BIN)/python -m benchmarks.training_overhead --quick

clean:
	rm -rf $(VENV) runs build *.egg-info
