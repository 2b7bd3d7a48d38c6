# The one entry for people, CI and the commit hooks. Bare `make` prints what there is.
.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV := $(or $(BYTEKILN_VENV),.venv)
BIN := $(VENV)/bin
PYTEST_FLAGS ?=
CORPUS ?=
ARM := aarch64-unknown-linux-gnu
# One Python for maturin and cargo, so that neither rebuilds what the other has built.
export PYO3_PYTHON := $(abspath $(BIN)/python)

.PHONY: help
help: ## print this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## make .venv, install the dependencies, build the Rust core (all other targets do this first)
	@scripts/setup.sh

.PHONY: demo
demo: setup ## real text to a trained model that speaks, in ./demo; CORPUS=path takes your own text
	@$(BIN)/python -m bytekiln.demo $(if $(CORPUS),--corpus "$(CORPUS)")

.PHONY: test
test: setup test-rust test-python ## every test but the slow ones

.PHONY: test-rust
test-rust: setup ## the tests of the Rust crates
	cargo test --quiet --workspace

.PHONY: test-python
test-python: setup ## the tests of the Python package; PYTEST_FLAGS="-k name" chooses
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not alone" -n auto --maxprocesses 8 --dist worksteal $(PYTEST_FLAGS)
	@# nothing selected (5) is no failure: PYTEST_FLAGS may have chosen others
	$(BIN)/python -m pytest -m "alone and not slow" $(PYTEST_FLAGS) || [ $$? -eq 5 ]

.PHONY: test-slow
test-slow: setup ## the tests that take more than half a minute each
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

.PHONY: lint
lint: setup lint-python lint-rust ## ruff, mypy, stubs, rustfmt, clippy

.PHONY: lint-python
lint-python: setup ## ruff, mypy --strict, and the stub of the Rust core against the core itself
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest bytekiln._core --concise

.PHONY: lint-rust
lint-rust: setup ## rustfmt and clippy, warnings are errors; NEON too where the target is installed
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	@if rustup target list --installed 2>/dev/null | grep -q '^$(ARM)$$' && command -v aarch64-linux-gnu-gcc >/dev/null; then \
		cargo clippy --quiet --target $(ARM) -p bytekiln-bpe -p bytekiln-simd -- -D warnings; \
	else echo "lint-rust: the NEON code is not checked without rustup target add $(ARM) and aarch64-linux-gnu-gcc"; fi

.PHONY: format
format: setup ## bring all source files into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cargo fmt --all

.PHONY: bench
bench: setup ## Criterion, pytest-benchmark, and the peers side by side (benches/RESULTS.md)
	@$(BIN)/python scripts/requirements.py --only bench | \
		xargs -n 1 $(BIN)/python -m pip install --quiet --disable-pip-version-check || echo "bench: going on without it"
	cargo bench --workspace
	$(BIN)/python -m pytest benches --benchmark-only --benchmark-columns=min,median,ops $(PYTEST_FLAGS)
	$(BIN)/python benches/peers.py all --quick

.PHONY: wheel-check
wheel-check: setup ## build the wheel and run it in an empty environment outside the source tree
	@scripts/wheel_check.sh

.PHONY: ci
ci: ## what CI runs
	@.ci/run

.PHONY: clean
clean: ## remove everything that is built or generated, the virtual environment included
	rm -rf $(VENV) target dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f python/bytekiln/_core.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
