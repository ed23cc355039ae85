# quickstart, test, check, bench, faults and docs create .venv if it is missing. gpu-check and gpu-bench use no .venv.
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

# All checks: format, lint, types, layers, docs, advisories and licences of the installed packages.
check: .venv/.installed lint types layers docs supply

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.installed
	$(BIN)/mypy

layers: .venv/.installed
	$(BIN)/lint-imports

REPOSITORY_URL ?= $(shell git remote get-url origin 2>/dev/null | grep '^http' | sed 's/\.git$$//')
docs: .venv/.installed
	REPOSITORY_URL="$(REPOSITORY_URL)" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

supply: .venv/.installed
	$(BIN)/python .ci/supply_chain.py

# bench: all speed figures (docs/performance.md). faults: all faults with 100 kills each (docs/reliability.md).
bench: .venv/.ops
	$(BIN)/python -m benchmarks

# For a GPU machine (docs/gpu.md): uses the active python, which needs torch and numpy. gpu-check runs the comparisons
# with a known answer, gpu-bench everything, in order. DEVICE=cpu tries the code on a CPU.
DEVICE ?= cuda
gpu-check:
	python -m benchmarks.gpu --checks --device $(DEVICE)

gpu-bench:
	python -m benchmarks.gpu --device $(DEVICE) $(if $(QUICK),--quick)

faults: .venv/.ops
	$(BIN)/python -m tests.faults

# requirements.lock has the tested versions, with hashes; `make lock` resolves it again from pyproject.toml.
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.13"
	$(BIN)/uv pip install --quiet --compile-bytecode --no-deps --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --no-deps -e .
	touch $@

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --generate-hashes --no-header -q -o requirements.lock

# DeepSpeed compiles its CPU collectives and CPU Adam on first use, which takes minutes. Compile before the timed tests.
.venv/.ops: .venv/.installed
	$(BIN)/python -m sfd_scale.engines.build_ops
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
