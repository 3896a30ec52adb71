# `make demo` and `make test` do all of their own set-up, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Threaded BLAS collapses when another process runs; XLA brings its own threads.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test test-all compat lint format clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[experiments]" --group dev
	touch $@

demo: $(VENV)/.ready  ## the Euclidean baseline and FG-SGD on digits, under three minutes
	$(BIN)/fgsgd demo

test: $(VENV)/.ready  ## the fast tests, under ten minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow"

test-all: $(VENV)/.ready  ## every test
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

compat: $(VENV)/.ready  ## every optimizer in every wrapper, hours; writes docs/compatibility.md
	$(BIN)/python tests/compat.py --product

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build runs
