# RECO Serve. Needs: Python >= 3.11 with venv, and make. `make serve` and `make test` install the rest into .venv.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
TEST_WORKERS ?= 3
UV_VERSION := 0.13.9
BIN := .venv/bin
UV := $(BIN)/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --upgrade

.PHONY: serve test setup lint format lock bench bench-memory bench-train bench-models chaos fuzz soak gpu docs clean help
.DEFAULT_GOAL := help

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

serve: .venv/.runtime ## install what serving needs and serve the bundled starter on HOST:PORT
	@$(BIN)/reco serve --host $(HOST) --port $(PORT)

test: .venv/.dev ## install what the tests need and run them
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal --cov --cov-report=term --cov-fail-under=92

setup: .venv/.dev ## install everything, development tools too

lint: .venv/.dev ## ruff, mypy --strict and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: .venv/.dev ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(UV) ## resolve pyproject.toml anew into the two lock files
	$(COMPILE) --extra build pyproject.toml -o requirements.lock
	$(COMPILE) --extra build --extra dev -c requirements.lock pyproject.toml -o requirements-dev.lock

bench: .venv/.dev ## serving beside the bare model; writes loadtests/results/
	$(BIN)/python -m loadtests.bench
	$(BIN)/python -m service.benchmarks.decoding

bench-memory: .venv/.dev ## a memory of a million pairs beside bare faiss; writes loadtests/results/, takes half an hour on two cores
	$(BIN)/python -m index_store.benchmarks.memory

bench-train: .venv/.dev ## training beside plain PyTorch and bare faiss; writes loadtests/results/, takes six minutes on two cores
	$(BIN)/python -m models.benchmarks.train

bench-models: .venv/.dev ## every architecture of open_clip beside open_clip itself; writes docs/reference/models.md, takes half an hour on two cores
	$(BIN)/python -m models.benchmarks.architectures

chaos: .venv/.dev ## kill builds, swaps and edits, those of a service too, at 200 random moments each
	RECO_KILLS=200 $(BIN)/python -m pytest --timeout 7200 index_store/tests/build/test_crash.py index_store/tests/edits/test_crash.py index_store/tests/build/test_resume.py service/tests/memories/test_swap_crash.py

fuzz: .venv/.dev ## run every fuzzer for a minute (RECO_FUZZ_S); RECO_FUZZ_SEED chooses another run
	RECO_FUZZ_S=$${RECO_FUZZ_S:-60} $(BIN)/python -m pytest --timeout 7200 index_store/tests/storage/test_fuzz.py models/tests/data/damage/test_fuzz.py service/tests/fuzz

soak: .venv/.dev ## honest callers beside hostile ones, swaps and edits for half an hour; writes loadtests/results/
	$(BIN)/python -m loadtests.hostile_load

gpu: .venv/.dev ## check correctness and speed on this machine's GPU in eight minutes; writes var/gpu/
	PYTHON=$(BIN)/python loadtests/gpu.sh

docs: .venv/.dev ## build the documentation site into var/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean: ## remove the environment, the caches and the local store
	rm -rf .venv var .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python3 has no venv module: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# One stamp per lock file: a second run installs nothing. What dev needs contains what serving needs.
.venv/.runtime: requirements.lock pyproject.toml | $(UV)
	@if [ -f .venv/.dev ]; then $(MAKE) --no-print-directory .venv/.dev; else \
	  $(UV) pip install --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock && \
	  $(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .; fi
	@touch $@

.venv/.dev: requirements-dev.lock pyproject.toml | $(UV)
	@$(UV) pip install --compile-bytecode --python $(BIN)/python --require-hashes -r requirements-dev.lock
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@
