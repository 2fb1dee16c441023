# make demo       set up, then train and run a small early-exit model on two CPU cores (some minutes, no GPU, no data needed)
# make demo-tune  add exits to a real model (SmolLM2-135M), tune them, compare before and after (some minutes, no GPU)
# make test-fast  set up, then run what takes no more than minutes: unit tests, and every program once
# make test       set up, then run all tests, two files at a time (TEST_PROCESSES=2)
# make lint       formatting, imports, spelling
# make bench      benchmarks (quick form); full ones: benchmarks/README.md

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TEST_PROCESSES ?= 2
DEMO_FOLDER ?= runs/demo
DEMO_TUNE_FOLDER ?= runs/demo-tune
BIN = $(VENV)/bin

.PHONY: setup demo demo-tune test test-fast lint bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh $(DEMO_FOLDER)

demo-tune: setup
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo_tune.sh $(DEMO_TUNE_FOLDER)

test-fast: setup
	$(BIN)/python -m pytest tests/smoke tests/unit -m "not slow" --durations 5

# The tests of a file share what they build. In the order of their names, many small files come last.
test: setup
	$(BIN)/python -m pytest tests --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

bench: setup
	$(BIN)/python benchmarks/training_overhead.py --quick

clean:
	rm -rf $(VENV) runs build *.egg-info
