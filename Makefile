# make demo | test | lint | bench | reproduce-small | reproduce-small-long. Everything is installed into .venv on first use; nothing needs to be activated.
TORCH ?= torch==2.13.0
PYTHONS ?= python3.13 python3.12 python3.11 python3.10 python3
PIP = .venv/bin/python -m pip --disable-pip-version-check install

.PHONY: demo test lint bench reproduce-small reproduce-small-long clean

demo: .venv/.core
	@.venv/bin/c2c ask

# A worker per core; then the real models, which take all cores and most of the memory, with nothing beside them.
test: .venv/.test
	@failed=0; \
	.venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup --ignore tests/real || failed=1; \
	.venv/bin/python -m pytest tests/real || failed=1; \
	exit $$failed

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python docs/make_api.py --check

bench: .venv/.test
	.venv/bin/python benchmarks/first_token.py

# What README.md's table comes from: hours on a CPU. Stopped in any way, it goes on where it was.
# DATA: a local mirror of the data sets; without one they come from the hub.
DATA ?= $(wildcard data)
reproduce-small: .venv/.core
	.venv/bin/c2c evaluate recipes/reproduce-small.yaml $(if $(DATA),--data-dir $(DATA))

# Prompts of 1,000, 2,000 and 4,000 tokens, with the fuser that was trained for them.
reproduce-small-long: .venv/.core
	.venv/bin/c2c evaluate recipes/reproduce-small-long.yaml $(if $(DATA),--data-dir $(DATA))

clean:
	rm -rf .venv

# An environment that works is kept. A name on the path may be a shim without an interpreter behind it, so each
# candidate is run before it is trusted.
.venv/.python:
	@if .venv/bin/python -m pip --version >/dev/null 2>&1; then touch $@; exit 0; fi; \
	for python in $(PYTHONS); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 || continue; \
	  echo "Making .venv with $$($$python --version)"; \
	  rm -rf .venv; $$python -m venv .venv && touch $@ && exit 0; \
	done; \
	rm -rf .venv; \
	echo "error: no usable Python among: $(PYTHONS); cache2cache needs Python 3.10 or later with the venv module;" \
	  "install one, or name it: make PYTHONS=/path/to/python3" >&2; exit 1

# torch goes in alone and first: the ranges in pyproject.toml then find it present and pull no other build of it.
.venv/.torch: .venv/.python
	@echo "Installing $(TORCH) (the largest part, once)"
	@$(PIP) "$(TORCH)"
	@touch $@

.venv/.core: .venv/.torch pyproject.toml
	@echo "Installing cache2cache and what it needs (about a minute)"
	@$(PIP) -qq -e .
	@touch $@

.venv/.test: .venv/.core
	@echo "Installing the test tools"
	@$(PIP) -qq -e ".[test]"
	@touch $@
