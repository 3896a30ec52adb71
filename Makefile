# `make demo` and `make test` do all of their own set-up, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Threaded BLAS collapses when another process runs; XLA brings its own threads.
export OPENBLAS_NUM_THREADS ?= 1

# What needs no more than library and adapters.
LIBRARY := $(wildcard $(patsubst %,tests/test_%*.py,bounds features flax groups kernels linalg manifolds readme \
	riemannian_adam transforms))
OLDEST := jax==0.8.1 optax==0.2.5 einops==0.8 jaxtyping==0.3 flax==0.12.1

.PHONY: demo test test-all test-accelerators compat bench accelerators docs notebooks dist wheel oldest lint format clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[experiments]" --group dev
	touch $@

demo: $(VENV)/.ready  ## the Euclidean baseline and FG-SGD on digits, under three minutes once installed
	$(BIN)/fgsgd demo

# Compilation is most of the time: without LLVM's optimization it takes two thirds, and by XLA's older emitters two thirds
# of that. test-all compiles as users do.
test: $(VENV)/.ready  ## the fast tests, under ten minutes on two cores
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" \
		$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow"

test-all: $(VENV)/.ready  ## every test, of test-accelerators the fast ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -q
	$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(MAKE) test-accelerators QUICK=1,\
		@echo "The compilers of TPUs and GPUs are for Linux on x86-64: test-accelerators is left out.")

compat: $(VENV)/.ready  ## every optimizer in every wrapper, hours, goes on where it was; writes docs/compatibility.md
	$(BIN)/python tools/compat.py

# Other libraries bring their own requirements: they get an environment to themselves.
$(VENV)-bench/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-bench/bin/python -m pip install --quiet --no-compile --editable ".[experiments]" --group bench
	touch $@

bench: $(VENV)-bench/.ready  ## beside other libraries, under 15 minutes; with QUICK=1 under two, with ALL=1 half an hour
	$(VENV)-bench/bin/python benchmarks/bench.py $(if $(QUICK),--quick) $(if $(ALL),--all) $(if $(ONLY),--only $(ONLY))

# The compilers of TPUs and GPUs come as wheels, for Linux on x86-64.
$(VENV)-accel/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-accel
	$(VENV)-accel/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-accel/bin/python -m pip install --quiet --no-compile --editable ".[flax]" --group accelerators --group tests
	touch $@

accelerators: $(VENV)-accel/.ready  ## updates compiled for TPUs and GPUs that are not there, 20 minutes of the processor
	$(VENV)-accel/bin/python benchmarks/accelerators.py $(if $(ONLY),--only $(ONLY))

test-accelerators: $(VENV)-accel/.ready  ## everything public compiled for them, by the same compilers; a part with QUICK=1
	$(VENV)-accel/bin/python -m pytest -q $(if $(QUICK),-m "not slow") tests/test_compiled.py

docs: $(VENV)/.ready  ## the site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(VENV)/.ready  ## runs every notebook from top to bottom, under three minutes each
	$(BIN)/python tools/notebooks.py

dist: $(VENV)/.ready  ## wheel and sdist, into dist/
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

wheel: dist  ## the fast tests of library and adapters on the wheel, in an environment that has nothing else
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-wheel/bin/python -m pip install --quiet "$$(ls dist/*.whl)[flax]" --group tests
	$(VENV)-wheel/bin/pytest -n 2 --dist loadfile -q -m "not slow" $(LIBRARY)

oldest:  ## the same with the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-oldest/bin/python -m pip install --quiet --editable ".[flax]" --group tests $(OLDEST)
	$(VENV)-oldest/bin/pytest -n 2 --dist loadfile -q -m "not slow" $(LIBRARY)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-oldest $(VENV)-bench $(VENV)-accel dist build runs site
