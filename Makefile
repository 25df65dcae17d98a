# make demo and make test need nothing but Python 3.11+; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint wheel clean

demo: .venv/installed
	$(BIN)/relibra demo

test: .venv/installed
	$(BIN)/python -m pytest -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/installed
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf .venv build dist demo-output *.egg-info

# torch first and alone: with it installed, nothing that follows pulls another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[transformers,plot,dev]'
	touch $@
