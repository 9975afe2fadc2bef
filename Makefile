# Each target does its own set-up and reuses it: the first run makes .venv, later
# ones remake it only when the locked versions or the packaging change.
#
#   make demo          speed and sameness of text on an embedded model, in 90 seconds;
#                      ARGS=--all beside vLLM alone and its ngram, in minutes
#   make test          units, and an engine on each of vLLM's two runners
#   make test-all      every test but the nightly ones
#   make test-nightly  the rest of the grids
#   make coverage      what no unit test runs
#   make test-next     what vLLM may break, with the next vLLM's Python
#   make test-next-engines  the same with engines
#   make lint          ruff, formatting, types, the graph of imports
#   make fuzz          hostile drafts on real engines; ARGS="--workloads 500 --seed 1"
#   make docs          the documentation as a site, in site/
#   make audit         the locked packages: consistent, and without known holes
#   make clean         removes .venv, .venv-next, .venv-docs and everything made
#
# Tests run two at a time; ARGS="-k tree" goes to pytest.
#
# PYTHON chooses the interpreter (3.11 or newer) that .venv is made with. Bytecode
# is made on first import, wherever the caller's environment forbids it too: without
# it each engine would compile all of torch and vLLM, 15 s more at every start.

unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
READY := $(VENV)/.ready
PREPARED := $(VENV)/.demo-prepared
TORCH := $(shell sed -n 's/^torch==/&/p' $(LOCK))

# Importing vLLM takes longer than most tests: these files are not even read.
WITHOUT_VLLM := --ignore-glob='tests/vllm/test_*' $(addprefix --ignore=tests/vllm/,cpu_kernels interpreted second_runner)
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder


# What builds the site; it needs neither vLLM nor this package.
DOCS := .venv-docs

# What touches vLLM's internals, without engines and with them. The whole suite a
# second time would take too long.
NEXT := .venv-next
NEXT_TESTS := $(addprefix tests/vllm/,test_drift.py test_releases.py test_vllm_names.py \
	test_args.py test_runner_choice.py test_refusals.py test_worker.py \
	cpu_kernels/test_pins.py)
NEXT_ENGINES := $(addprefix tests/vllm/,engines/test_cpu_kernels.py \
	servers/test_serving_statistics.py \
	second_runner/test_text.py::test_text_is_vllms_own_without_speculation \
	engines/test_exactness.py::test_text_is_the_same_as_without_speculation)

.PHONY: help demo test test-all test-nightly test-next test-next-engines coverage lint fuzz docs audit clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(PREPARED)
	$(BIN)/python -m examples.demo $(ARGS)

test: $(READY)
	$(PYTEST) -m "unit or lint or smoke" $(WITHOUT_VLLM) $(ARGS)

test-all: $(READY)
	$(PYTEST) --durations=40 $(ARGS)

test-nightly: $(READY)
	$(PYTEST) -m nightly --durations=40 $(ARGS)

coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadgroup -m unit $(WITHOUT_VLLM) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-next: $(NEXT)/.ready
	$(NEXT)/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=10 \
		$(ARGS) $(NEXT_TESTS)

test-next-engines: $(NEXT)/.ready
	$(NEXT)/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=10 \
		-k "not chunked and not preempting" $(ARGS) $(NEXT_ENGINES)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tests/meta/typecheck.py
	$(BIN)/python tests/meta/import_graph.py

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(ARGS)

docs: $(DOCS)/.ready
	$(DOCS)/bin/mkdocs build --strict --quiet $(ARGS)

audit: $(READY)
	$(BIN)/python tests/meta/audit.py

clean:
	rm -rf $(VENV) $(NEXT) $(DOCS) site .typecheck .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	rm -f .coverage .coverage.*
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

$(PREPARED): $(READY)
	@echo "==> once for the demo: its model, and compiling what its engine runs (minutes)"
	@$(BIN)/python -m examples.demo --prepare
	@touch $@

$(NEXT)/.ready: $(READY) requirements/next.py requirements/next.txt
	@$(BIN)/python requirements/next.py --folder $(NEXT)
	@touch $@

$(DOCS)/.ready: requirements/docs.txt
	@sh requirements/venv.sh "$(PYTHON)" "$(DOCS)"
	@$(DOCS)/bin/python -m pip install --quiet -r requirements/docs.txt
	@touch $@
