# Two commands: `make demo` and `make test`. PYTHON is any Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint docs clean

demo: $(INSTALLED)
	$(BIN)/condiquant demo

# CI: or OpenVINO forks the process to report every conversion over the network.
test: lint
	CI=true OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# constraints.txt is the whole tested set, so only torch, whose needs depend on the machine, is resolved.
# BasicSR's build imports torch, which must be there before it.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	grep -v '^basicsr==' constraints.txt > $(VENV)/before-basicsr.txt
	$(PIP) --no-deps -r $(VENV)/before-basicsr.txt
	$(PIP) --no-deps --no-build-isolation -c constraints.txt basicsr
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out
