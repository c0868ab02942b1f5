# From a fresh clone with Python 3.11 or later: the first target run makes .venv with the tested versions.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check bench completions docs clean

quickstart: .venv/installed
	$(BIN)/moectl quickstart quickstart --overwrite

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python completions/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/moectl bench report benchmarks/results/layer-cpu.json --check README.md

bench: .venv/installed
	$(BIN)/python benchmarks/upcycle.py

completions: .venv/installed
	$(BIN)/python completions/generate.py

docs: .venv/installed
	$(BIN)/python docs/generate.py

.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv: some minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv quickstart build dist .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
