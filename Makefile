# `make demo` trains and compares small models, `make test` checks everything, `make reproduce` runs the
# papers' experiments in short, `make docs` builds the site. All need only Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

INSTALLED_FROM := pyproject.toml constraints.txt setup.py $(wildcard csrc/cpu/*)

.PHONY: demo test reproduce docs clean

demo: $(VENV)/.installed
	$(BIN)/fastpref demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

reproduce: $(VENV)/.installed
	$(BIN)/fastpref reproduce all --quick

docs: $(VENV)/.installed-dev
	$(BIN)/python -m fastpref.docgen.config > docs/config.md
	$(BIN)/python -m fastpref.docgen.objectives > docs/objectives.md
	$(BIN)/python -m fastpref.docgen.architecture
	$(BIN)/python -m benchmarks.tables
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info runs/demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "fastpref needs Python 3.11, 3.12 or 3.13; try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(BIN)/python $(INSTALLED_FROM)
	$(BIN)/pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python $(INSTALLED_FROM)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
