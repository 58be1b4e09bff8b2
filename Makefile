# make demo         train the demo (installs the CPU build first when nothing is installed)
# make test         lint, type check and run every test
# make test-long    the tests of four hosts, of a very long response and of real engines that die: about nine minutes
# make lint         only lint and type check
# make install-gpu  install the CUDA build instead
# make gpu-check    does everything that needs a GPU work on this one? Six minutes at most
# make clean        remove the virtual environment
#
# PYTHON=python3.12 picks the interpreter; RUN_ARGS="seed=1 name=demo-1" adds settings to the demo and
# CHECK_ARGS="--parts a c" options to the check; TEST_WORKERS=1 runs one test at a time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GPU := $(VENV)/.gpu
# What the environment holds, or will hold: install-gpu leaves a mark in it.
LOCK := $(if $(wildcard $(GPU)),gpu,cpu)
SIZE := $(if $(wildcard $(GPU)),220 of them and a download of 4 GB,150 of them and 2.5 GB)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
RUN_ARGS ?=
CHECK_ARGS ?=
TEST_WORKERS ?= 2
# Tests share two cores with the processes that they start.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: demo test test-long lint install-gpu gpu-check clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@echo "== training the demo: about four minutes on two cores; Ctrl-C stops it"
	@$(BIN)/python run.py train -c demo --overwrite $(RUN_ARGS)

test: lint
	@echo "== tests, $(TEST_WORKERS) at a time"
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone and not long"
	@echo "== tests that need the cores for themselves, one at a time"
	@$(BIN)/python -m pytest -m alone

test-long: $(STAMP)
	@echo "== long tests, one at a time"
	@$(BIN)/python -m pytest -m long

lint: $(STAMP)
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy

install-gpu:
	@test -e $(GPU) || test ! -e $(STAMP) || { \
		echo "error: $(VENV) holds the CPU build: make clean first, or name another folder with VENV=..." >&2; exit 1; }
	@mkdir -p $(VENV) && touch $(GPU)
	@$(MAKE) --no-print-directory $(STAMP)

# Needs no environment of its own: where there is no network, whatever python has torch and transformers will do.
gpu-check:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(CHECK_ARGS)

$(STAMP): requirements/$(LOCK).lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=..." >&2; exit 1; }
	@echo "== making $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== installing the locked packages: about $(SIZE), a few minutes"
	@$(PIP) install --no-deps -r requirements/$(LOCK).lock
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		echo "== this build of torch needs CUDA libraries; installing them"; \
		$(PIP) install "$$(grep '^torch==' requirements/$(LOCK).lock)"; }
	@echo "== installing async-vapo itself (editable)"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV)
