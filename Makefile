# Two commands from a fresh clone: `make quickstart` and `make test`. Everything they install lives in .venv/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
# What torch and DeepSpeed compile on first use stays with its environment; they look for ninja on the PATH.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.PHONY: quickstart digits test test-full test-xxl lint types clean check-tools

quickstart: $(VENV)/installed
	@$(RUN) sctrain quickstart

# The quality recipe, about an hour on two CPU cores.
digits: $(VENV)/installed
	@$(RUN) sctrain quickstart --recipes digits/full

test: $(VENV)/installed-dev
	@$(RUN) pytest -q -m "not full"

test-full: $(VENV)/installed-dev
	@$(RUN) pytest -q

# One step of the largest network: an hour, 20 GB of memory, 50 GB of disk.
test-xxl: $(VENV)/installed-dev
	@$(RUN) pytest -q -s tests/system/xxl.py

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	@$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml | check-tools
	@echo "environment: creating $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@echo "environment: installing sctrain and what it needs (some minutes, several gigabytes)" >&2
	@$(PIP) install -e .
	@mkdir -p $(TORCH_EXTENSIONS_DIR)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "environment: installing the developer's tools" >&2
	@$(PIP) install -e '.[dev]'
	@touch $@

# Before anything is created: what pip cannot bring, each with its mend.
check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)': install Python 3.11 or newer, or name it with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) -V) is too old: install Python 3.11 or newer, and name it with PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments: install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" || { echo "$(PYTHON) has no headers: install them (Debian: apt install python3-dev)" >&2; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || { echo "There is no C++ compiler: install one (Debian: apt install g++)" >&2; exit 2; }
