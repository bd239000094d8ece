# Everything a newcomer types. Needs python3 (3.10 to 3.13) and make, nothing activated.
# PYTHON chooses another interpreter; PIP_* variables are honoured (e.g. PIP_EXTRA_INDEX_URL for CPU-only torch).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Tests of one file share what takes long to set up.
TWO_AT_A_TIME := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-gpu test-matrix test-export bench-order bench-resume bench-data bench-memory bench-gpu bench-step bench-checkpoint chaos lint

help: ## explain the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything in it (quick when up to date)

# The pins of requirements.lock are for Python 3.11; other versions take the ranges of setup.cfg.
$(STAMP): setup.cfg requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@set -e; \
	if [ "$$($(BIN)/python -c 'import sys; print(sys.version_info[:2] == (3, 11))')" = True ]; then \
		pins="-c requirements.lock"; \
	else \
		pins=""; echo "requirements.lock is for Python 3.11: installing the newest versions that setup.cfg allows"; \
	fi; \
	set -x; \
	$(BIN)/python -m pip install $$pins "torch==2.13.0"; \
	$(BIN)/python -m pip install $$pins -e ".[dev]"
	touch $@

demo: install ## train, stop, resume, export and use a small Emu on drawn scenes; writes outputs/demo/report.html
	$(BIN)/python -m benchmarks.demo.run

test: install ## the whole test suite
	$(TESTS) -m "not matrix" $(TWO_AT_A_TIME)

test-fast: install ## the tests that take seconds
	$(TESTS) -m "not slow and not gpu and not matrix" $(TWO_AT_A_TIME)

test-gpu: install ## the tests that need a CUDA device, which all others do not look at
	$(TESTS) -m gpu

test-matrix: install ## training in every parallel layout, and every move of a checkpoint between layouts
	$(TESTS) tests/distributed -m matrix

chaos: install ## 25 runs whose ranks are killed at random times, and every other fault
	EMU_CHAOS_RUNS=25 $(TESTS) tests/chaos -n 2 --dist load

test-export: install ## an exported package in an environment that has only its own dependencies
	$(TESTS) tests/inference -m clean_env

bench-order: install ## how soon a rank is ready in a corpus of 7e9 samples, at 0 % and 90 % of an epoch
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.order

bench-resume: install ## time to the first batch at 90 % of an epoch over that at 0 %, local and over http
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.resume

bench-data: install ## the data pipeline's speed against webdataset and against bare decoding, row fill and pixels
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.data

bench-memory: install ## peak bytes of a training step against the closed form of launch.plan, three models
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.memory

bench-step: install ## a training step against padded batches, against its bare parts, and vision under tp=2
	$(BIN)/python -m benchmarks.step

bench-checkpoint: install ## what a checkpoint in the background costs over one that the step waits for, and monitoring
	$(BIN)/python -m benchmarks.checkpoint

bench-gpu: install ## one GPU: flash attention's loss, utilisation and memory of a 3B model, packed against padded rows
	$(BIN)/python -m benchmarks.gpu

lint: install ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
