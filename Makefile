# quickstart · test · check · bench · faults · docs: each makes .venv if it is missing. gpu-check · gpu-bench take none.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-full check lint types layers docs supply bench gpu-check gpu-bench faults lock clean

quickstart: .venv/.ops
	PATH="$(CURDIR)/$(BIN):$$PATH" launchers/quickstart.sh

test: .venv/.ops
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-full: .venv/.ops
	$(BIN)/python -m pytest -m "not gpu"

# The one check command: format, lint, types, layers, docs, advisories and licences of what is installed.
check: .venv/.installed lint types layers docs supply

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.installed
	$(BIN)/mypy

layers: .venv/.installed
	$(BIN)/lint-imports

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

supply: .venv/.installed
	$(BIN)/python .ci/supply_chain.py

# Every speed figure beside its peer (docs/performance.md), and every fault with 100 kills (docs/reliability.md).
bench: .venv/.ops
	$(BIN)/python -m benchmarks

# On a GPU machine, by the python that is active: they need torch, numpy and this checkout. `make gpu-bench DEVICE=cpu
# QUICK=1` runs the same code small on a CPU.
DEVICE ?= cuda
gpu-check:
	python -m benchmarks.gpu check --device $(DEVICE)

gpu-bench:
	python -m benchmarks.gpu bench --device $(DEVICE) $(if $(QUICK),--quick)

faults: .venv/.ops
	$(BIN)/python -m tests.faults

# requirements.lock is the tested set, with hashes; `make lock` resolves it anew from pyproject.toml.
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock
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
