# Every target sets up what it needs, into .venv, and is quick the second time.
BIN := .venv/bin
PACKAGES := flows tasks forge_core storage
BAR ?=
PYTHON ?= python3

.PHONY: help setup demo test test-long lint docs bench prove server clean

help:
	@echo "make demo    post-train a small model on this machine and show what it learned"
	@echo "make test    run the tests, or some of them: make test ARGS=tests/unit"
	@echo "make test-long  run the longest ones on the real stack"
	@echo "make lint    check format, style and types"
	@echo "make docs    build the docs' site into site/; a broken link is an error"
	@echo "make bench   run the benchmarks"
	@echo "make prove   show that one promise holds: make prove BAR=learning"
	@echo "make server  start a Prefect server to watch runs in"
	@echo "make clean   remove .venv, caches and the demo's store"

setup:
	@deployments/setup

demo: setup
	@$(BIN)/forgeflow run --preset tiny --store forge-store

# Unit tests keep a core busy each; a test on the real stack has its own processes, and the cores to itself.
test: setup
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest --numprocesses 2 tests/unit
	@$(BIN)/python -m pytest tests/stack
endif

test-long: setup
	@$(BIN)/python -m pytest tests/long

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(PACKAGES)

# The site's packages have an environment of their own, so that they constrain nothing that runs.
.venv-docs/installed-lock.txt: deployments/requirements-docs.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r $<
	@cp $< $@

docs: setup .venv-docs/installed-lock.txt
	@$(BIN)/python docs/cli_reference.py > docs/cli.md
	@# Not --quiet: mkdocs then counts no warning, and strict finds nothing.
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

bench: setup
	@set -e; for file in benchmarks/bench_*.py; do \
		echo "== $$file"; name=$${file%.py}; $(BIN)/python -m "$$(echo $$name | tr / .)"; \
	done

prove: setup
	@test -n "$(BAR)" || { echo "Say which promise: make prove BAR=learning" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.prove --bar $(BAR)

server: setup
	@exec $(BIN)/forgeflow server

clean:
	rm -rf .venv .venv-docs site docs/cli.md .hypothesis .mypy_cache .pytest_cache .ruff_cache .prefect forge-store *.egg-info
	find $(PACKAGES) tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
