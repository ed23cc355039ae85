# quickstart · test · check: each makes .venv if it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-full check lint types layers lock clean

quickstart: .venv/.ops
	PATH="$(CURDIR)/$(BIN):$$PATH" launchers/quickstart.sh

test: .venv/.ops
	$(BIN)/python -m pytest

test-full: .venv/.ops
	$(BIN)/python -m pytest -m "not gpu"

# The one check command: format, lint, types, layers.
check: .venv/.installed lint types layers

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.installed
	$(BIN)/mypy

layers: .venv/.installed
	$(BIN)/lint-imports

# requirements.lock is the tested set, with hashes; `make lock` resolves it anew from pyproject.toml.
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --no-deps -e .
	touch $@

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --generate-hashes --no-header -q -o requirements.lock

# DeepSpeed compiles its CPU collectives and CPU Adam on first use, for minutes: here, before anything with a time limit.
.venv/.ops: .venv/.installed
	$(BIN)/python -m sfd_scale.engines.build_ops
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
