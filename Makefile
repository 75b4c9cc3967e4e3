# `make demo` and `make test` do the whole set-up on a fresh machine. Name another torch with, say, TORCH="torch==2.11.0".
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
# One stamp a torch, so that naming another one installs it.
TORCH_STAMP = $(VENV)/.torch-$(shell printf '%s' "$(TORCH)" | tr -c 'A-Za-z0-9.' '-')

.PHONY: demo test test-distributed lint setup clean

demo: $(VENV)/.demo
	$(VENV)/bin/pipeboost demo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n logical

# Every pipeline in every layout of ranks, and every other combination that `make test` leaves out.
test-distributed: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/distributed -m ""
	$(VENV)/bin/python -m pytest tests/pipelines tests/unit -m exhaustive

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell src patches tests examples benchmarks docs README.md CONTRIBUTING.md

setup: $(VENV)/.dev

$(TORCH_STAMP):
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/.demo: $(TORCH_STAMP) pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[quality]"
	touch $@

$(VENV)/.dev: $(TORCH_STAMP) pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_output
