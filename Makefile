# Each target sets up what it needs by itself: see scripts/bootstrap.

.DEFAULT_GOAL := help
.PHONY: help run test check format docs bench soak lock clean
MAKEFLAGS += --no-print-directory

VENV_PYTHON := .venv/bin/python
ARGS ?=
JOBS ?= 2

PORT ?= 8000
WORKERS ?= 2
GRID ?= embedded:
export PORT WORKERS GRID

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=/path/to/python3.x chooses the interpreter that .venv is made with."
	@echo "  GRID_SERVER=valkey-server make test runs the tests against that in place of redis-server."

run: ## Serve the example shop; PORT=8000 WORKERS=2 GRID=embedded: (or redis://127.0.0.1:6379/0)
	@scripts/bootstrap dev
	@exec $(VENV_PYTHON) examples/shop/serve.py

test: ## Run the tests; ARGS="-k cookie -x" goes to pytest, JOBS=0 runs them one by one
	@scripts/bootstrap test
	@$(VENV_PYTHON) -m pytest -n $(JOBS) $(ARGS)

check: ## Check format, lint, types, import rules and module length
	@scripts/bootstrap dev
	@$(VENV_PYTHON) -m ruff format --check
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo
	@$(VENV_PYTHON) scripts/check_module_length.py

format: ## Format the code and mend what ruff can mend
	@scripts/bootstrap dev
	@$(VENV_PYTHON) -m ruff check --fix-only
	@$(VENV_PYTHON) -m ruff format

docs: ## Write docs/settings.md anew from the docstrings
	@scripts/bootstrap dev
	@$(VENV_PYTHON) scripts/settings_reference.py >docs/settings.md.new
	@mv docs/settings.md.new docs/settings.md

bench: ## Run the benchmarks; ARGS goes to them
	@scripts/bootstrap bench
	@$(VENV_PYTHON) -m benchmarks $(ARGS)

soak: ## Run the long attacks; ARGS goes to pytest
	@scripts/bootstrap test
	@$(VENV_PYTHON) -m pytest -m soak --timeout=3600 -o faulthandler_timeout=3590 $(ARGS)

lock: ## Resolve requirements/*.txt anew; ARGS=--upgrade moves every pin
	@scripts/lock $(ARGS)

clean: ## Remove the virtual environment, caches and built packages
	rm -rf .venv .venv.lock build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks scripts -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
