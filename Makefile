# Each target does its own set-up and reuses it: the first run makes .venv, later
# ones remake it only when the locked versions or the packaging change.
#
#   make demo    speed and sameness of text on an embedded model
#   make test    the test suite, two files at a time; ARGS="-k tree" goes to pytest
#   make lint    ruff, formatting, types
#   make fuzz    hostile drafts on real engines; ARGS="--workloads 500 --seed 1"
#   make audit   the locked packages: consistent, and without known holes
#   make clean   removes .venv and everything made
#
# PYTHON chooses the interpreter (3.11 or newer) that .venv is made with. Bytecode
# is made on first import: compiling all packages would double the set-up time.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==/&/p' $(LOCK))

.PHONY: help demo test lint fuzz audit clean
.DELETE_ON_ERROR:

help:
	@sed -n '4,9s/^#   //p' Makefile

demo: $(READY)
	$(BIN)/python -m examples.demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tests/tools/typecheck.py

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(ARGS)

audit: $(READY)
	$(BIN)/python tests/tools/audit.py

clean:
	rm -rf $(VENV) .typecheck .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(LOCK) pyproject.toml
	@echo "==> [1/4] virtual environment in $(VENV)"
	@sh requirements/venv.sh "$(PYTHON)" "$(VENV)"
	@echo "==> [2/4] $(TORCH) (CPU build 190 MB; where pip finds none, the CUDA build)"
	@$(BIN)/python -m pip install --no-compile --constraint $(LOCK) $(TORCH)
	@echo "==> [3/4] vLLM for CPU and everything else in $(LOCK) (a minute or a few)"
	@$(BIN)/python -m pip install --no-compile --no-deps -r $(LOCK)
	@echo "==> [4/4] this package, editable"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "==> ready"
