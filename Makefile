# make demo      everything from nothing: environment, packages, every paper's toy recipe, one report
# make test      unit and smoke tests; make test-all adds the slow, browser and GPU ones
# make lint      style of code and notebooks
# make lab       JupyterLab

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
ARGS ?=

.PHONY: demo test test-all test-slow test-browser test-gpu lint lab setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo test test-slow test-browser test-gpu: export HF_HUB_OFFLINE = 1

demo: $(READY)
	$(BIN)/lab demo $(ARGS)

test: $(READY)
	$(PYTEST) tests/unit tests/smoke $(ARGS)

test-slow: $(READY)
	$(PYTEST) tests/slow $(ARGS)

test-browser: $(READY)
	$(PYTEST) tests/browser $(ARGS)

test-gpu: $(READY)
	$(PYTEST) tests/gpu $(ARGS)

test-all: test test-slow test-browser test-gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(READY)
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
