# What a contributor types; CI types the same. `make` alone lists the targets.
# More arguments for pytest or the benchmark: make test ARGS="-k eviction -x"

PYTHON ?= python3
ARGS ?=

VENV := .venv
READY := $(VENV)/.ready
LOG := $(VENV)/install.log
REQUIREMENTS := tests/requirements.txt
NO_DEPS := tests/requirements-no-deps.txt

WINDOWS_EXE := dist/llama-sidecar.exe

VENV_PYTHON := $(VENV)/bin/python
# The fake llama-server's first line asks PATH for python3.
PYTEST := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV_PYTHON) -m pytest

.DEFAULT_GOAL := help
.PHONY: help run test test-unit test-integration test-windows test-windows-unit lint build \
	build-windows bench bench-flags bench-trace soak eval clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) ## start the daemon with two small real models, and print curl lines to try
	@settings=$$($(VENV_PYTHON) -m tests.real_parts demo) || exit 1; \
	eval "$$settings"; \
	exec $(VENV_PYTHON) llama_sidecar.py

test: $(READY) ## run every test that this machine can run
	@$(PYTEST) -m "not windows" $(ARGS)

test-unit: $(READY) ## run the tests that need no real llama-server
	@$(PYTEST) -m "not integration and not windows" $(ARGS)

test-integration: $(READY) ## run the tests with the real llama-server and real models
	@$(PYTEST) -m integration $(ARGS)

test-windows: $(WINDOWS_EXE) ## run the tests of the exe under Wine: chats, NSSM, services
	@$(PYTEST) -m windows $(ARGS)

test-windows-unit: $(READY) ## run the unit suite with the Windows Python under Wine
	@$(VENV_PYTHON) -m tests.windows_parts test $(ARGS)

lint: $(READY) ## check style, format and types, for Linux and for Windows
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy .
	$(VENV_PYTHON) -m mypy --platform win32 --cache-dir .mypy_cache/win32 .

build: $(READY) ## make the one-file program dist/llama-sidecar
	@[ "$$(uname)" != Linux ] || command -v objdump >/dev/null || \
	  { echo "make: the build needs objdump: apt-get install binutils" >&2; exit 1; }
	$(VENV_PYTHON) -m PyInstaller --noconfirm --log-level WARN build.spec
	@ls -l dist/llama-sidecar

build-windows: $(READY) ## make dist/llama-sidecar.exe, on Linux (wine64, gcc-mingw-w64-x86-64)
	@$(VENV_PYTHON) -m tests.windows_parts build

$(WINDOWS_EXE): $(READY) $(wildcard *.py) flags.json build.spec tests/windows_parts.py
	@$(VENV_PYTHON) -m tests.windows_parts build

bench: $(READY) ## measure what the daemon adds to a request (needs wrk and nginx)
	@$(VENV_PYTHON) bench/proxy_overhead.py $(ARGS)

bench-flags: $(READY) ## measure what judging the flags of a request costs
	@$(VENV_PYTHON) bench/validation.py $(ARGS)

bench-trace: $(READY) ## count the loads of a recorded trace, with and without a step's time
	@$(VENV_PYTHON) -m bench.trace_replay $(ARGS)

soak: $(READY) ## let agents ask for 10 minutes while processes are killed
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV_PYTHON) -m bench.soak $(ARGS)

eval: $(READY) ## ask a running daemon benchmark questions: make eval ARGS="--task gsm8k --model ID"
	@$(VENV_PYTHON) -m eval.run $(or $(ARGS),--task gsm8k --model default --limit 5)

clean: ## remove everything that these targets made, downloads included
	rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml $(REQUIREMENTS) $(NO_DEPS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: needs Python 3.11 or newer, and '$(PYTHON)' is not: apt-get install python3," \
	         "or name another with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: needs Python's venv and ensurepip: apt-get install python3-venv" >&2; exit 1; }
	@echo "make: installing the development packages into $(VENV) (700 MB, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@{ $(VENV_PYTHON) -m pip install --disable-pip-version-check -r $(REQUIREMENTS) && \
	   $(VENV_PYTHON) -m pip install --disable-pip-version-check --no-deps -r $(NO_DEPS); \
	 } >$(LOG) 2>&1 || \
	  { echo "make: pip could not install the packages (is the package index reachable?):" \
	         "$$(grep '^ERROR' $(LOG) | tail -n 1) (all of it: $(LOG))" >&2; exit 1; }
	@touch $@
