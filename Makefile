# Every target sets up what it needs, into .venv, and is quick the second time.
BIN := .venv/bin
PACKAGES := flows tasks forge_core storage
BAR ?=

.PHONY: help setup demo test test-long lint bench prove server clean

help:
	@echo "make demo    post-train a small model on this machine and show what it learned"
	@echo "make test    run the tests, or some of them: make test ARGS=tests/unit"
	@echo "make test-long  run the longest ones on the real stack"
	@echo "make lint    check format, style and types"
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
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache .prefect forge-store *.egg-info
	find $(PACKAGES) tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
